"""The models of a training: transformers' own. The student has gradients, on all weights or on low-rank adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

from genssd.distill.train.batches import Batch
from genssd.distill.train.distributed import whole
from genssd.engine.checkpoint import weight_files
from genssd.engine.errors import CheckpointError, InputError
from genssd.engine.text import Tokenizer


def load_model(
    directory: Path,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> Any:
    """A transformers model. Raises CheckpointError when a weight is missing or misshapen, the tokenizer does not fit,
    or the head is more than a matrix product."""
    weight_files(directory)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=attn_implementation,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be loaded by transformers: {error}") from None
    absent = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind])
    if absent:
        raise CheckpointError(f"{directory}: weights are missing or misshapen: {', '.join(absent[:5])}")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.largest_id >= rows:
        raise CheckpointError(
            f"{directory}: the tokenizer's largest id is {tokenizer.largest_id}, but the embedding has {rows} rows"
        )
    _check_head(model, directory)
    return model.to(device)


@torch.no_grad()
def _check_head(model: Any, directory: Path) -> None:
    """The loss takes hidden @ weight for the logits; a bias, a softcap or a scale would be left out silently."""
    ids = torch.arange(8)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = hidden @ model.get_output_embeddings().weight.T
    if not torch.allclose(logits, model(input_ids=ids, use_cache=False).logits, atol=1e-3, rtol=1e-3):
        raise CheckpointError(
            f"{directory}: the head of {model.config.model_type} is more than a matrix product (a bias, a softcap or a "
            "scale), which training does not support yet"
        )


def load_teacher(directory: Path, student: Tokenizer, device: torch.device, dtype: torch.dtype) -> Any:
    """A model to distil from: frozen. Raises InputError when its tokenizer is another than the student's."""
    tokenizer = Tokenizer(directory)
    if tokenizer.fingerprint != student.fingerprint:
        raise InputError(
            f"teacher {directory} and student {student.directory} have different vocabularies: their distributions do "
            "not compare token by token. Train on the teacher's text instead: kd_ratio 0"
        )
    return load_model(directory, tokenizer, device, dtype=dtype).eval().requires_grad_(False)


def check_layout(model: Any, layout: str) -> None:
    """Raise InputError when a model's attention cannot take the mask of a packed layout."""
    if layout == "pad":
        return
    config, attention = model.config, model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise InputError(f"layout {layout} needs a mask of its own, which {attention} does not take: use sdpa or eager")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise InputError(f"layout {layout} cannot mask the sliding windows of {config.model_type}: use layout pad")


def completion_states(model: Any, batch: Batch) -> Tensor:
    """The hidden states that predict the completion tokens, [M, D]."""
    mask = batch.attention_mask
    if mask.ndim == 4 and model.config._attn_implementation == "eager":
        dtype = model.get_input_embeddings().weight.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    out = model.base_model(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    )
    # positions that are not trained never meet the head
    hidden: Tensor = out.last_hidden_state.flatten(0, 1)[batch.source]
    return hidden


def save_model(model: Any, tokenizer: Tokenizer, directory: Path, *, write: bool = True) -> None:
    """A save_pretrained directory with tokenizer and chat template; adapters are merged into the weights, and stand
    beside them in adapter/. Raises InputError when it cannot be written.

    Of a model that is split over processes all have to call this, one with write.
    """
    state = _merged(model) if has_adapters(model) else {k: _own(v) for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if not write:
        return
    try:
        if has_adapters(model):
            save_adapters(model, directory / "adapter")
        model.save_pretrained(directory, state_dict=state)
        tokenizer.hf.save_pretrained(directory)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory} cannot be written: {error}") from None


def _own(value: Tensor) -> Tensor:
    """A whole tensor on the CPU that shares its memory with no neighbour."""
    value = whole(value).detach().cpu()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def add_adapters(model: Any, *, r: int, alpha: int, dropout: float, targets: tuple[str, ...]) -> None:
    """Put trainable low-rank adapters into the layers of a model and freeze the rest.

    targets: module names, or "all-linear" alone. Raises InputError without peft, when no module has one of the names,
    and for the embedding and the head, whose weights are used as they are.
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
    """Every name is that of a module inside of the layers."""
    names = [name for name, _ in model.named_modules()]
    outside = [name for name, module in model.named_modules() if module in _ends(model)]
    for target in targets:
        found = [name for name in names if name == target or name.endswith(f".{target}")]
        if not found:
            known = sorted({name.rsplit(".", 1)[-1] for name in names if name.endswith("_proj")})
            raise InputError(f"lora_target_modules: no module is called {target!r}; there are {', '.join(known)}")
        if set(found) & set(outside):
            raise InputError(f"lora_target_modules: {target} is no part of a layer; adapters go to projections")


def _ends(model: Any) -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def has_adapters(model: Any) -> bool:
    return hasattr(model, "peft_config")


def save_adapters(model: Any, directory: Path) -> None:
    """The adapters alone, as peft writes them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    save_file(
        {f"base_model.model.{name}": value.contiguous() for name, value in state.items()},
        directory / "adapter_model.safetensors",
    )
    model.peft_config["default"].save_pretrained(directory)


def load_adapters(model: Any, directory: Path) -> None:
    """Into adapters of the same shapes."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(directory / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {name.removeprefix("base_model.model."): value for name, value in state.items()})


def _merged(model: Any) -> dict[str, Tensor]:
    """The weights with what the adapters add to them, under their own names; the model stays as it is."""
    from peft.tuners.lora import LoraLayer

    state = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            state[f"{name}.weight"] = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
    return state
