"""Low-rank adapters (LoRA) of the student: put into its layers, trained in place of its weights, merged into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from genssd.distill.train.distributed import gather_shards
from genssd.engine.common.errors import CheckpointError, InputError
from genssd.engine.common.quoting import one_line

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Beginning of the names of all tensors in that file, in the format of peft."""


def add_adapters(model: Any, *, r: int, alpha: int, dropout: float, targets: tuple[str, ...]) -> None:
    """Put trainable low-rank adapters into the layers of a model and freeze its other weights.

    targets: module names, or "all-linear" alone. Raises InputError when peft is not installed, when no module has one
    of the names, and when a name is that of the embedding or the head, whose weights the loss uses directly.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("use_peft needs the package peft: pip install peft") from None
    if targets != ("all-linear",):
        _check_targets(model, targets)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets[0] if targets == ("all-linear",) else list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError(f"lora_target_modules: {error}") from None
    model.peft_config = {"default": config}


def _check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """Check that every target is the name of a module inside the layers. Raises InputError if it is not."""
    names = [name for name, _ in model.named_modules()]
    outside_layers = (model.get_input_embeddings(), model.get_output_embeddings())
    outside = [name for name, module in model.named_modules() if module in outside_layers]
    for target in targets:
        matching = [name for name in names if name == target or name.endswith(f".{target}")]
        if not matching:
            known = sorted({name.rsplit(".", 1)[-1] for name in names if name.endswith("_proj")})
            raise InputError(f"lora_target_modules: no module is called {target!r}; there are {', '.join(known)}")
        if set(matching) & set(outside):
            raise InputError(f"lora_target_modules: {target} is no part of a layer; adapters go to projections")


def has_adapters(model: Any) -> bool:
    """Return whether `add_adapters` has put adapters into the model."""
    return hasattr(model, "peft_config")


def collect_adapters(model: Any) -> dict[str, Tensor]:
    """Return the adapters by the names in peft's file, on the CPU; every process of a training has to call this."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    return {f"{PREFIX}{name}": gather_shards(value).detach().cpu().contiguous() for name, value in state.items()}


def save_adapters(model: Any, adapters: Mapping[str, Tensor], directory: Path) -> None:
    """Write the adapters that `collect_adapters` returned on their own, in the format of peft."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(adapters), directory / ADAPTER_FILE)
    model.peft_config["default"].save_pretrained(directory)


def load_adapters(model: Any, directory: Path) -> None:
    """Load adapters from a directory into a model that has adapters of the same shapes.

    Raises CheckpointError naming the file and the tensor that is missing, unknown, or of another shape or data type.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    file = directory / ADAPTER_FILE
    try:
        state = {name.removeprefix(PREFIX): value for name, value in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {one_line(error)}") from None
    expected = get_peft_model_state_dict(model)
    for name in sorted(expected.keys() ^ state.keys()):
        raise CheckpointError(f"{file} has {'no' if name in expected else 'an unknown'} tensor {PREFIX}{name}")
    for name, value in state.items():
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype:
            raise CheckpointError(
                f"{file}: {PREFIX}{name} is {value.dtype} {list(value.shape)}, not {expected[name].dtype} "
                f"{list(expected[name].shape)}"
            )
        if not value.isfinite().all():
            raise CheckpointError(f"{file}: {PREFIX}{name} holds NaN or infinity")
    set_peft_model_state_dict(model, state)


def iter_merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the full weights to which adapters are added, by the names of the model without adapters; change none.

    Every process of a training has to iterate, because sharded weights are gathered from all.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            added = gather_shards(layer.get_delta_weight("default").detach())
            yield f"{name}.weight", gather_shards(layer.base_layer.weight.detach()) + added


def find_plain_name(name: str) -> str | None:
    """Return the name that a tensor of a model with adapters has in the model without; None for the tensors of an
    adapter, and for a weight to which one is added.
    """
    if ".lora_" in name or name.endswith(".base_layer.weight"):
        return None
    return name.replace(".base_layer.", ".")
