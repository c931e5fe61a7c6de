"""Parts of a decoder's shape that differ between model families, and the names of a layer's tensors in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ActivationName = Literal["silu", "gelu_tanh", "clamped"]
"""Function of the gate in a feed-forward block. clamped: that of GPT-OSS (`kernels/activation.clamped_swiglu`)."""
QkNorm = Literal["head", "width"]
"""What the norm of queries and keys covers: every head alone (Qwen3), or all heads of a token together (OLMo-2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """One rotary position embedding of a model; layers may have different ones, or none."""

    parameters: Mapping[str, object]
    """The checkpoint's `rope_parameters`, see `kernels/rotary.rope_frequencies`."""
    width: int
    """How many numbers of a head are rotated, from its first on; an even number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The feed-forward block of a mixture of experts."""

    layers: tuple[bool, ...]
    """Per layer: whether it has experts; the others have one dense block."""
    count: int
    per_token: int
    """Number of experts that compute each token."""
    intermediate_size: int
    """Feed-forward width of one expert."""
    normalize: bool
    """Whether the weights of a token's experts are divided by their sum."""
    select_first: bool = False
    """Whether the softmax is taken over the logits of the selected experts alone (GPT-OSS)."""
    biased: bool = False
    """Whether the router and the experts have biases."""
    alpha: float = 1.702
    """Slope of the sigmoid in the activation "clamped"."""
    limit: float = 7.0
    """Bound of gate and up projection in the activation "clamped"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Names of the tensors of a layer's experts."""

    router: str = "mlp.gate"
    parts: tuple[str, str, str] | None = (
        "mlp.experts.{}.gate_proj",
        "mlp.experts.{}.up_proj",
        "mlp.experts.{}.down_proj",
    )
    """Names of gate, up and down projection with a place for the expert's number. None: the checkpoint holds one tensor
    for all experts, `mlp.experts.gate_up_proj` [X, D, 2 F] with alternating columns of gate and up, and
    `mlp.experts.down_proj` [X, F, D]."""


LISTED_EXPERTS = ExpertNames()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNames:
    """Names of the tensors of one layer in a checkpoint, after `model.layers.N.` and without `.weight` or `.bias`."""

    attention_norm: str | None = "input_layernorm"
    """Norm of what the attention reads; None where the family has none."""
    attention_post_norm: str | None = None
    """Norm of what the attention returns, before it is added to the residual stream."""
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """The projections of queries, keys and values, or the one that has them all."""
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """The projections of gate and values of the feed-forward block, or the one that has both."""
    down: str = "mlp.down_proj"
    experts: ExpertNames = LISTED_EXPERTS


LLAMA_NAMES = LayerNames()
"""The names that most families have."""
