"""An estimate of the memory that a training takes besides the weights, and its check against what a CPU has free.

    the larger of   gradients + moments   and   moments + activations

where the gradients count on both sides with gradient_accumulation_steps above 1: otherwise they grow in the backward
pass as the activations go. The activations of a pass are, in float32 unless it computes in bfloat16:

* what the layers keep for the backward pass: the residual stream, the norms' values, queries, keys and values (each
  repeated for every head that reads it), the attention's output, and four values of the feed-forward;
* with eager attention the scores, [rows, heads, length, length] of every layer, and their copies in one layer;
* with gradient checkpointing the input of every layer, and all of the above for one layer;
* the gradients within one layer, or one chunk of logits with its gradients, whichever takes more;
* the gradient of the head's weight, once for each loss, and in bfloat16 a copy of the weights.

A divergence adds two chunks of logits; the layers of a teacher keep nothing. Not counted are the cache in which the
student writes on-policy, which takes what is free, and what the allocator holds of freed memory.
tests/distill/train/test_activations.py compares the estimate with what the system reports.

Shapes:  D hidden size   V vocabulary   T length of a row
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from genssd.distill.data.examples import Example
from genssd.distill.train.config import TrainSettings
from genssd.distill.train.on_policy import STATES_PER_WEIGHT
from genssd.engine.common.amounts import format_count
from genssd.engine.setup.memory import check_bytes_fit
from genssd.kernels.head import rows_per_chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The largest batch of one forward pass."""

    rows: int
    """Number of rows of tokens."""
    length: int
    """Number of tokens in a row, padding included."""
    completion_tokens: int
    """Number of tokens whose logits are computed."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @staticmethod
    def of_equal(config: TrainSettings, *, length: int, prompt: int) -> BatchShape:
        """Return the shape of a batch of examples of one length, of which so many tokens are the prompt's."""
        size = config.per_device_train_batch_size
        completion_tokens = size * (length - prompt)
        if config.layout == "pad":
            return BatchShape(rows=size, length=length, completion_tokens=completion_tokens)
        return BatchShape(rows=1, length=size * length, completion_tokens=completion_tokens)

    @staticmethod
    def of(examples: Sequence[Example], config: TrainSettings) -> BatchShape:
        """Return the shape of the largest batch that these examples can form."""
        size = min(config.per_device_train_batch_size, len(examples))
        lengths, completions = [], []
        for example in examples:
            longest = len(example.input_ids)
            if config.lmbda:  # the student may write so much
                longest = max(longest, min(config.max_length, example.num_prompt + config.rollout.max_tokens))
            lengths.append(longest)
            completions.append(longest - example.num_prompt)
        longest_rows = sorted(lengths)[-size:]
        num_completion = sum(sorted(completions)[-size:])
        if config.layout == "pad":
            return BatchShape(rows=size, length=longest_rows[-1], completion_tokens=num_completion)
        return BatchShape(rows=1, length=sum(longest_rows), completion_tokens=num_completion)


def estimate_activation_bytes(model: Any, batch: BatchShape, config: TrainSettings, *, bf16: bool) -> int:
    """Return about how many bytes the activations of a forward and backward pass of a transformers model take.

    bf16: whether the pass computes in bfloat16. The result is 0 for a model whose config does not name its sizes.
    """
    shape = model.config
    try:
        num_layers, width = int(shape.num_hidden_layers), int(shape.hidden_size)
        inner, heads = int(shape.intermediate_size), int(shape.num_attention_heads)
        vocabulary = int(model.get_output_embeddings().weight.shape[0])
    except (AttributeError, TypeError):
        return 0
    head_width = heads * int(getattr(shape, "head_dim", None) or width // heads)
    size = 2 if bf16 else 4
    # the residual stream and the norms stay in float32, what the products read is copied
    per_token = 6 * width * 4 + (2 * width * size if bf16 else 0) + (5 * head_width + 4 * inner) * size
    scores = 0
    if shape._attn_implementation == "eager":
        scores = batch.rows * heads * batch.length**2 * 4
    layer = per_token * batch.tokens + scores
    kept = layer * num_layers
    if config.gradient_checkpointing:
        kept = layer + num_layers * batch.tokens * width * 4
    layer_gradients = (3 * inner + 2 * width) * size * batch.tokens + 2 * scores
    chunk = min(batch.completion_tokens, rows_per_chunk(batch.completion_tokens, vocabulary, torch.device("cpu")))
    losses = 2 if 0.0 < config.kd_ratio < 1.0 else 1
    logits = (4 if config.kd_ratio else 2) * chunk * vocabulary * 4
    head = losses * vocabulary * width * 4
    copies = sum(p.numel() for p in model.parameters()) * 2 if bf16 else 0
    return kept + max(layer_gradients, logits) + head + copies


def estimate_training_bytes(model: Any, batch: BatchShape, config: TrainSettings, *, bf16: bool) -> int:
    """Return about how many bytes a training takes besides the weights of its models."""
    trainable = _count_trainable_bytes(model)
    states = STATES_PER_WEIGHT * trainable
    held = states if config.gradient_accumulation_steps > 1 else states - trainable
    return max(states, held + estimate_activation_bytes(model, batch, config, bf16=bf16))


def _count_trainable_bytes(model: Any) -> int:
    return sum(int(parameter.nbytes) for parameter in model.parameters() if parameter.requires_grad)


def check_training_fits(
    model: Any, examples: Sequence[Example], config: TrainSettings, device: torch.device, *, bf16: bool
) -> None:
    """Check that a CPU has memory for a training. Raises CapacityError that names the bytes and what to lower."""
    batch = BatchShape.of(examples, config)
    adapters = "" if config.use_peft else ", train adapters alone (use_peft)"
    check_bytes_fit(
        STATES_PER_WEIGHT * _count_trainable_bytes(model),
        "the gradients and the optimizer's states",
        device,
        remedy=f"raise the limit of memory{adapters}, or take a smaller model",
    )
    fewer = [] if config.gradient_checkpointing or config.key_attention.weight else ["use gradient_checkpointing"]
    if batch.rows > 1 or config.layout != "pad":
        fewer.append("lower per_device_train_batch_size (and raise gradient_accumulation_steps as much)")
    check_bytes_fit(
        estimate_training_bytes(model, batch, config, bf16=bf16),
        f"the optimizer's states, the gradients and (about) the activations of one pass over {batch.rows} x "
        f"{format_count(batch.length, 'token')}",
        device,
        remedy=", ".join(
            [
                *fewer,
                *(["lower rollout.memory_bytes"] if config.lmbda else []),
                "lower max_length, or raise the limit of memory",
            ]
        ),
    )
