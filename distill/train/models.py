"""Loading the models of a training, which are transformers' own classes. The teacher is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from genssd.distill.data.examples import Example
from genssd.distill.train.batches import TokenBatch
from genssd.distill.train.key_attention import AttentionCollector
from genssd.engine.amounts import format_count
from genssd.engine.config import ModelConfig, is_supported, make_transformers_config
from genssd.engine.config_files import read_config
from genssd.engine.errors import CheckpointError, InputError
from genssd.engine.parameters import match_parameters
from genssd.engine.quoting import one_line
from genssd.engine.text import Tokenizer
from genssd.engine.token_map import TokenMap, match_tokenizers
from genssd.engine.weights import UNUSED, WeightFiles
from genssd.engine.wrappers import KEY_MAPPING, text_part
from genssd.kernels.head import squash


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
    if fields.get("quantization_config"):
        raise CheckpointError(
            f"{directory / 'config.json'}: weights in MXFP4 cannot be trained, nor be a teacher in training: "
            "load them in transformers with Mxfp4Config(dequantize=True), and save the model with save_pretrained"
        )
    config = make_transformers_config(fields, directory / "config.json")
    weights = WeightFiles.open(directory)
    if is_supported(fields):
        match_parameters(weights, ModelConfig.load(directory))
    if attn_implementation is None and getattr(config, "attn_logit_softcapping", None):
        attn_implementation = "eager"  # the only one in transformers that caps the scores
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=attn_implementation,
            key_mapping=KEY_MAPPING if text_part(fields) else None,
            trust_remote_code=False,
            local_files_only=True,
        )
    except Exception as error:  # model classes raise what their construction does
        raise CheckpointError(f"{directory} cannot be loaded by transformers: {one_line(error)}") from None
    _check_weights(model, info, weights)
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.largest_id >= rows:
        raise CheckpointError(
            f"{directory}: the tokenizer's largest id is {tokenizer.largest_id}, but the embedding has "
            f"{format_count(rows, 'row')}"
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
    """Check that the logits are what `scale_states` and `logits_softcap` say, and nothing more.

    The loss would silently leave out a bias or another scale.
    """
    ids = torch.arange(8)[None]
    hidden = scale_states(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    logits = squash(hidden @ model.get_output_embeddings().weight.T, 1.0, logits_softcap(model))
    if not torch.isfinite(logits).all():
        raise CheckpointError(f"{directory}: the model gives NaN or infinite logits; check the weights")
    if not torch.allclose(logits, model(input_ids=ids, use_cache=False).logits, atol=1e-3, rtol=1e-3):
        raise CheckpointError(
            f"{directory}: the head of {model.config.model_type} is more than a matrix product with a softcap or a "
            "divisor (a bias or another scale), which training does not support"
        )


def logits_softcap(model: Any) -> float | None:
    """Return the bound of a model's logits, softcap * tanh(logits / softcap), as Gemma 2 has one; None without."""
    return getattr(model.config, "final_logit_softcapping", None)


def scale_states(model: Any, states: Tensor) -> Tensor:
    """Return hidden states whose product with the head are the model's logits: Granite divides its logits."""
    divisor = getattr(model.config, "logits_scaling", None)
    return states if divisor in (None, 1) else states / divisor


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """A model to distil from, frozen, and how it reads the student's tokens."""

    model: Any
    token_map: TokenMap
    largest_id: int
    """Largest token id of its tokenizer."""

    def check_example(self, example: Example) -> None:
        """Check that the teacher has all tokens of an example. Raises InputError naming its row if it does not."""
        prompt = example.teacher_prompt_ids or example.input_ids[: example.num_prompt]
        self.check_reads(prompt, example.completion_ids, example.where)

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
    token_map = match_teacher(tokenizer, student)
    model = load_model(directory, tokenizer, device, dtype=dtype).eval().requires_grad_(False)
    return Teacher(model=model, token_map=token_map, largest_id=tokenizer.largest_id)


def match_teacher(teacher: Tokenizer, student: Tokenizer) -> TokenMap:
    """Return how a teacher to distil from reads the student's tokens. Raises InputError as `load_teacher` does."""
    try:
        token_map = match_tokenizers(student, teacher, f"student {student.directory}", f"teacher {teacher.directory}")
        token_map.check_no_conflict()
    except InputError as error:
        raise InputError(f"{error}. Train on the teacher's text instead: kd_ratio 0") from None
    return token_map


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
    """Run a model and return the hidden states that predict the completion tokens, [M, D], as `scale_states` does.

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
    return scale_states(model, hidden)
