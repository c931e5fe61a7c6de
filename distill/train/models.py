"""Loading and saving the models of a training, which are transformers' own classes.

The student is trained on all weights or on low-rank adapters; the teacher is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from genssd.distill.runs.writing import sync_files
from genssd.distill.train.batches import TokenBatch
from genssd.distill.train.distributed import gather_shards
from genssd.distill.train.key_attention import AttentionCollector
from genssd.engine.config import ARCHITECTURES, ModelConfig, make_transformers_config, read_config
from genssd.engine.errors import CheckpointError, GenssdError, InputError
from genssd.engine.parameters import match_parameters
from genssd.engine.quoting import one_line
from genssd.engine.text import Tokenizer
from genssd.engine.token_map import TokenMap, match_tokenizers
from genssd.engine.weights import UNUSED, WeightFiles


def load_model(
    directory: Path,
    tokenizer: Tokenizer,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> Any:
    """Load a causal language model with transformers.

    The weights are checked as those of the engine's decoder are, so both read the same tensors. Raises CheckpointError
    when a weight is missing, misshapen or none of the model's, the tokenizer does not fit, or the head is more than a
    matrix product.
    """
    fields = read_config(directory)
    config = make_transformers_config(fields, directory / "config.json")
    weights = WeightFiles.open(directory)
    if fields.get("model_type") in ARCHITECTURES:
        match_parameters(weights, ModelConfig.load(directory))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # model classes raise what their construction does
        raise CheckpointError(f"{directory} cannot be loaded by transformers: {one_line(error)}") from None
    _check_weights(model, info, weights)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.largest_id >= rows:
        raise CheckpointError(
            f"{directory}: the tokenizer's largest id is {tokenizer.largest_id}, but the embedding has {rows} rows"
        )
    try:
        _check_head(model, directory)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{directory}: a forward pass with transformers fails: {one_line(error)}") from None
    return model.to(device)


def _check_weights(model: Any, info: Mapping[str, Any], weights: WeightFiles) -> None:
    """Check what transformers reports on loading a model, and separate a head that only the config ties.

    Raises CheckpointError when a weight is missing or misshapen, holds no plain floats, or has the model's own prefix
    and is unknown to the model.
    """
    absent = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in info[kind])
    if absent:
        raise CheckpointError(f"{weights.directory}: weights are missing or misshapen: {', '.join(absent[:5])}")
    own = (f"{model.base_model_prefix}.", "lm_head.")
    unknown = sorted(name for name in info["unexpected_keys"] if name.startswith(own) and not UNUSED.search(name))
    if unknown:
        file = weights.tensors[unknown[0]].file if unknown[0] in weights.tensors else weights.directory
        raise CheckpointError(f"{file} has a tensor {unknown[0]} that {type(model).__name__} does not have")
    for name in weights.tensors:
        if name not in info["unexpected_keys"] and not UNUSED.search(name):
            weights.check_dtype(name)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        # the checkpoint has two different tables: a config that ties them would lose the head at the next loading
        model.config.tie_word_embeddings = False


@torch.no_grad()
def _check_head(model: Any, directory: Path) -> None:
    """Check that the logits are hidden @ weight; the loss would silently leave out a bias, a softcap or a scale."""
    ids = torch.arange(8)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = hidden @ model.get_output_embeddings().weight.T
    if not torch.isfinite(logits).all():
        raise CheckpointError(f"{directory}: the model gives NaN or infinite logits; check the weights")
    if not torch.allclose(logits, model(input_ids=ids, use_cache=False).logits, atol=1e-3, rtol=1e-3):
        raise CheckpointError(
            f"{directory}: the head of {model.config.model_type} is more than a matrix product (a bias, a softcap or a "
            "scale), which training does not support yet"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A model to distil from, frozen, and how it reads the student's tokens."""

    model: Any
    token_map: TokenMap
    largest_id: int
    """Largest token id of its tokenizer."""

    def check_reads(self, prompt_ids: Sequence[int], completion_ids: Sequence[int], label: str) -> None:
        """Check that the teacher has all tokens of a prompt of its own, and of the student's completion.

        Raises InputError, with the label in its message, on one that it lacks.
        """
        self.token_map.check_same(completion_ids, label)
        wrong = next((i for i in prompt_ids if i > self.largest_id), None)
        if wrong is not None:
            raise InputError(f"{label}: token id {wrong} of the prompt is not in the teacher's vocabulary")


def load_teacher(directory: Path, student: Tokenizer, device: torch.device, dtype: torch.dtype) -> Teacher:
    """Load a model to distil from. Raises InputError when its tokenizer does not match the student's.

    An id that both have must be the same token in both; a token that the student alone has is refused when the teacher
    would have to read it.
    """
    tokenizer = Tokenizer(directory)
    try:
        token_map = match_tokenizers(student, tokenizer, f"student {student.directory}", f"teacher {directory}")
        token_map.check_no_conflict()
    except InputError as error:
        raise InputError(f"{error}. Train on the teacher's text instead: kd_ratio 0") from None
    model = load_model(directory, tokenizer, device, dtype=dtype).eval().requires_grad_(False)
    return Teacher(model=model, token_map=token_map, largest_id=tokenizer.largest_id)


def check_layout(model: Any, layout: str) -> None:
    """Check that a model's attention takes the mask of a layout. Raises InputError if it does not."""
    if layout == "pad":
        return
    config, attention = model.config, model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise InputError(f"layout {layout} needs a mask of its own, which {attention} does not take: use sdpa or eager")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise InputError(f"layout {layout} cannot mask the sliding windows of {config.model_type}: use layout pad")


def compute_completion_states(model: Any, batch: TokenBatch, attention: AttentionCollector | None = None) -> Tensor:
    """Run a model and return the hidden states that predict the completion tokens, [M, D].

    attention: takes the attention to key words of every layer; the model's attention implementation must be that of
    key_attention.py. Raises InputError when the model does not pass it on to its attention.
    """
    mask = batch.attention_mask
    if mask.ndim == 4 and model.config._attn_implementation == "eager":
        dtype = model.get_input_embeddings().weight.dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    options = {} if attention is None else {"attention_collector": attention}
    out = model.base_model(
        input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False, **options
    )
    if attention is not None and not attention.is_filled:
        raise InputError(f"key_attention cannot read the attention of {model.config.model_type}: leave it out")
    # only positions that predict a completion token go through the head
    hidden: Tensor = out.last_hidden_state.flatten(0, 1)[batch.source]
    return hidden


def save_model(model: Any, tokenizer: Tokenizer, directory: Path, *, write: bool = True) -> None:
    """Write a save_pretrained directory with tokenizer and chat template. Raises InputError when it cannot be written.

    Adapters are merged into the weights, and also written on their own into adapter/. Every process of a training has
    to call this, because sharded weights are gathered from all; only one of them with write.
    """
    state = (
        _merge_adapters(model) if has_adapters(model) else {k: _copy_to_cpu(v) for k, v in model.state_dict().items()}
    )
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if not write:
        return
    try:
        if has_adapters(model):
            save_adapters(model, directory / "adapter")
        model.save_pretrained(directory, state_dict=state)
        tokenizer.hf.save_pretrained(directory)
        sync_files(directory)
    except GenssdError:
        raise
    except Exception as error:  # safetensors and tokenizers report a full disk by types of their own, or by Exception
        raise InputError(f"{directory} cannot be written: {one_line(error)}") from None


def _copy_to_cpu(value: Tensor) -> Tensor:
    """Return the full tensor on the CPU, as a copy if its memory holds more than this tensor."""
    value = gather_shards(value).detach().cpu()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


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


def save_adapters(model: Any, directory: Path) -> None:
    """Write the adapters on their own, in the format of peft."""
    from peft import get_peft_model_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    save_file(
        {f"base_model.model.{name}": value.contiguous() for name, value in state.items()},
        directory / "adapter_model.safetensors",
    )
    model.peft_config["default"].save_pretrained(directory)


def load_adapters(model: Any, directory: Path) -> None:
    """Load adapters from a directory into a model that has adapters of the same shapes."""
    from peft import set_peft_model_state_dict

    state = load_file(directory / "adapter_model.safetensors")
    set_peft_model_state_dict(model, {name.removeprefix("base_model.model."): value for name, value in state.items()})


def _merge_adapters(model: Any) -> dict[str, Tensor]:
    """Return the weights with the adapters added, by the names of the model without adapters; change no weight."""
    from peft.tuners.lora import LoraLayer

    state = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            state[f"{name}.weight"] = layer.base_layer.weight.detach() + layer.get_delta_weight("default").detach()
    return state
