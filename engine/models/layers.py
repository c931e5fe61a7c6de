"""The weights of a decoder's layers, built from the tensors of a checkpoint.

Shapes:  D model width   H query heads   G kv heads   E head dim   F feed-forward width   X experts
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.parameters import DOWN, GATE_UP, take
from genssd.engine.families.shape import Experts
from genssd.kernels.experts import ExpertWeights
from genssd.kernels.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """A matrix and its bias; projections that read the same input are stacked into one."""

    weight: Weight
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeights:
    """A feed-forward block that all tokens take."""

    gate_up: Projection  # [2 F, D]
    down: Projection  # [D, F]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedWeights:
    """A feed-forward block of experts, and the router that chooses those of a token."""

    router: Projection  # [X, D]
    experts: ExpertWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One transformer block; a norm that the family does not have is None."""

    attention_norm: Tensor | None  # [D]
    attention_post_norm: Tensor | None  # [D], of what is added to the residual stream
    qkv: Projection  # [(H + 2 G) E, D]
    q_norm: Tensor | None  # [E], or [H E]
    k_norm: Tensor | None  # [E], or [G E]
    sinks: Tensor | None  # float32 [H]
    output: Projection  # [D, H E]
    mlp_norm: Tensor | None  # [D]
    mlp_post_norm: Tensor | None  # [D]
    mlp: DenseWeights | RoutedWeights
    window: int  # how many positions a token sees, itself included; 0: all
    rope: int | None  # index of its rotary embedding; None: positions are not rotated


class LayerBuilder:
    """Builds layers from tensors by the names of a checkpoint; all but the stacked ones are used without a copy.

    prepare: makes a weight of a matrix, which may be a copy. Every function raises CheckpointError on a tensor that is
    missing or misshapen.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: ModelConfig,
        directory: Path,
        prepare: Callable[[Tensor], Weight],
        *,
        frozen: bool,
    ) -> None:
        self._tensors = tensors
        self._config = config
        self._directory = directory
        self._prepare = prepare
        self._frozen = frozen

    def build(self, index: int) -> LayerWeights:
        """Return one layer."""
        c, names, prefix = self._config, self._config.names, f"model.layers.{index}."
        q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        rows = (q_width, kv_width, kv_width) if len(names.qkv) == 3 else (q_width + 2 * kv_width,)
        norm_widths = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (q_width, kv_width)
        has_experts = c.experts is not None and c.experts.layers[index]
        return LayerWeights(
            attention_norm=self._norm(prefix, names.attention_norm),
            attention_post_norm=self._norm(prefix, names.attention_post_norm),
            qkv=self._stack(prefix, dict(zip(names.qkv, rows, strict=True)), c.hidden_size, c.qkv_bias),
            q_norm=self._take(f"{prefix}self_attn.q_norm.weight", norm_widths[0]) if c.qk_norm else None,
            k_norm=self._take(f"{prefix}self_attn.k_norm.weight", norm_widths[1]) if c.qk_norm else None,
            sinks=self._take(f"{prefix}self_attn.sinks", c.num_attention_heads).float() if c.sinks else None,
            output=self._stack(prefix, {names.output: c.hidden_size}, q_width, c.output_bias),
            mlp_norm=self._norm(prefix, names.mlp_norm),
            mlp_post_norm=self._norm(prefix, names.mlp_post_norm),
            mlp=self._routed(prefix, c.experts) if c.experts is not None and has_experts else self._dense(prefix),
            window=c.windows[index],
            rope=c.layer_ropes[index],
        )

    def _dense(self, prefix: str) -> DenseWeights:
        c, names = self._config, self._config.names
        rows = c.intermediate_size if len(names.gate_up) == 2 else 2 * c.intermediate_size
        return DenseWeights(
            gate_up=self._stack(prefix, dict.fromkeys(names.gate_up, rows), c.hidden_size, c.mlp_bias),
            down=self._stack(prefix, {names.down: c.hidden_size}, c.intermediate_size, c.mlp_bias),
        )

    def _routed(self, prefix: str, experts: Experts) -> RoutedWeights:
        c, names = self._config, self._config.names.experts
        width, feed, count = c.hidden_size, experts.intermediate_size, experts.count
        router = names.router if f"{prefix}{names.router}.weight" in self._tensors else "mlp.gate"
        biases: tuple[Tensor | None, Tensor | None] = (None, None)
        if f"{prefix}{GATE_UP}" in self._tensors and names.parts is not None:  # the model of a training
            gate_up = self._take(f"{prefix}{GATE_UP}", count, 2 * feed, width)
            down = self._take(f"{prefix}{DOWN}", count, width, feed)
        elif names.parts is None:
            gate_up = _separate(self._take(f"{prefix}{GATE_UP}", count, width, 2 * feed).transpose(1, 2))
            down = self._take(f"{prefix}{DOWN}", count, feed, width).transpose(1, 2).contiguous()
            if experts.biased:
                gate_up_bias = self._take(f"{prefix}{GATE_UP}_bias", count, 2 * feed)
                biases = _separate(gate_up_bias), self._take(f"{prefix}{DOWN}_bias", count, width)
        else:
            return self._listed(prefix, router, experts)
        return RoutedWeights(
            router=self._stack(prefix, {router: count}, width, experts.biased),
            experts=ExpertWeights(
                gate_up=self._pack_all(gate_up),
                gate_up_bias=biases[0],
                down=self._pack_all(down),
                down_bias=biases[1],
            ),
        )

    def _listed(self, prefix: str, router: str, experts: Experts) -> RoutedWeights:
        """Return experts that have tensors of their own each, which are packed one after the other."""
        width, feed, parts = self._config.hidden_size, experts.intermediate_size, self._config.names.experts.parts
        assert parts is not None

        def take(part: str, expert: int, *shape: int) -> Tensor:
            return self._take(f"{prefix}{part.format(expert)}.weight", *shape)

        gate, up, down = parts
        pairs = (torch.cat([take(gate, i, feed, width), take(up, i, feed, width)]) for i in range(experts.count))
        downs = (take(down, i, width, feed) for i in range(experts.count))
        return RoutedWeights(
            router=self._stack(prefix, {router: experts.count}, width, experts.biased),
            experts=ExpertWeights(
                gate_up=self._gather(pairs), gate_up_bias=None, down=self._gather(downs), down_bias=None
            ),
        )

    def _pack_all(self, stacked: Tensor) -> tuple[Weight, ...] | Tensor:
        """Return a tensor of all experts' matrices as the kernels take them: packed one by one on the CPU."""
        if not self._frozen or stacked.device.type != "cpu":
            return stacked
        return tuple(self._prepare(matrix) for matrix in stacked)

    def _gather(self, matrices: Iterable[Tensor]) -> tuple[Weight, ...] | Tensor:
        prepared = [matrix if matrix.device.type != "cpu" else self._prepare(matrix) for matrix in matrices]
        on_cpu = prepared[0].device.type == "cpu"
        return tuple(prepared) if on_cpu else torch.stack([m for m in prepared if isinstance(m, Tensor)])

    def _take(self, name: str, *shape: int) -> Tensor:
        return take(self._tensors, name, shape, self._directory)

    def _norm(self, prefix: str, name: str | None) -> Tensor | None:
        return None if name is None else self._take(f"{prefix}{name}.weight", self._config.hidden_size)

    def _stack(self, prefix: str, rows: Mapping[str, int], inputs: int, biased: bool) -> Projection:
        """Return projections by their names and numbers of rows as one."""
        weights = [self._take(f"{prefix}{name}.weight", count, inputs) for name, count in rows.items()]
        biases = [self._take(f"{prefix}{name}.bias", count) for name, count in rows.items()] if biased else []
        return Projection(weight=self._prepare(_joined(weights)), bias=_joined(biases) if biased else None)


def _joined(parts: list[Tensor]) -> Tensor:
    """Return the tensors stacked along the first dimension; a single one without a copy."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _separate(alternating: Tensor) -> Tensor:
    """Return gate rows first, then up rows, of a tensor [X, 2 F, ...] in which they alternate."""
    return torch.cat([alternating[:, ::2], alternating[:, 1::2]], dim=1)
