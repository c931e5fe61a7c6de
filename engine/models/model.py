"""One decoder for all supported families (families/), over packed tokens and a paged key-value cache.

Shapes:  N packed tokens   D model width   V vocabulary   H query heads   G kv heads   E head dim
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.parameters import (
    EMBEDDING,
    HEAD,
    count_cache_values,
    count_forward_values,
    count_weights,
    match_parameters,
    take,
)
from genssd.engine.checkpoints.weights import WeightFiles
from genssd.engine.common.errors import CheckpointError
from genssd.engine.models.forward_batch import ForwardBatch
from genssd.engine.models.layers import DenseWeights, LayerBuilder, LayerWeights, RoutedWeights
from genssd.engine.models.model_head import ModelHead
from genssd.kernels.activation import Activation, clamped_swiglu, geglu, swiglu
from genssd.kernels.attention import paged_attention
from genssd.kernels.cache import write_kv
from genssd.kernels.experts import expert_mlp, route
from genssd.kernels.linear import linear
from genssd.kernels.norm import add_rms_norm, rms_norm
from genssd.kernels.rotary import rope_frequencies, rotary_angles
from genssd.kernels.weight import Weight, pack_weight, select_rows

Angles = Mapping[int | None, tuple[Tensor, Tensor]]
"""Cosines and sines of the positions of a batch for each rotary embedding of a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The weights of a model and its forward pass, without cache and sequences."""

    config: ModelConfig
    embedding: Weight  # [V, D]
    head: ModelHead  # its weight is the embedding itself where they are tied
    norm: Tensor  # [D]
    layers: tuple[LayerWeights, ...]
    frequencies: Mapping[
        int | None, tuple[Tensor, float]
    ]  # per rotary embedding: [width / 2], and factor of the angles
    activation: Activation  # of the feed-forward blocks

    @staticmethod
    @torch.inference_mode()
    def load(directory: Path, dtype: torch.dtype, device: torch.device, *, deterministic: bool = True) -> Decoder:
        """Build from a Hugging Face directory. Raises CheckpointError on anything missing, misshapen or unsupported.

        Tensors are read one after the other, so that beyond the model memory is needed for one layer alone.
        """
        config, weights = ModelConfig.load(directory), WeightFiles.open(directory)
        with weights.reading(match_parameters(weights, config), dtype, device) as tensors:
            return Decoder.from_tensors(config, tensors, directory, frozen=True, deterministic=deterministic)

    @staticmethod
    def from_tensors(
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        directory: Path,
        *,
        frozen: bool = False,
        deterministic: bool = True,
    ) -> Decoder:
        """Build from tensors by the names of a checkpoint; all but the stacked ones are used without a copy.

        frozen: the tensors never change; on the CPU the matrices are then packed for the kernels, which is a copy.
        directory: used in messages. deterministic: as in `ModelHead`. Raises CheckpointError on a tensor that is
        missing or misshapen.
        """
        prepare = pack_weight if frozen else _unchanged
        embedding, head = _prepare_tables(tensors, config, directory, prepare)
        builder = LayerBuilder(tensors, config, directory, prepare, frozen=frozen)
        return Decoder(
            config=config,
            embedding=embedding,
            head=ModelHead(
                weight=head,
                softcap=config.logits_softcap,
                divisor=config.logits_divisor,
                deterministic=deterministic,
            ),
            norm=take(tensors, "model.norm.weight", (config.hidden_size,), directory),
            layers=tuple(builder.build(i) for i in range(config.num_hidden_layers)),
            frequencies=_frequencies(config, embedding.device, directory),
            activation=_choose_activation(config),
        )

    def stacked(self) -> dict[str, Tensor]:
        """Return the parts of the stacked matrices by the names of a checkpoint, as views.

        Where a model under training uses them as its parameters, its updates reach this decoder without a copy. A
        frozen decoder has none.
        """
        c, names = self.config, self.config.names
        q, kv, f = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.intermediate_size
        views: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            groups = [(names.qkv, [q, kv, kv], layer.qkv)]
            if isinstance(layer.mlp, DenseWeights):
                groups.append((names.gate_up, [f, f], layer.mlp.gate_up))
            for parts, rows, stack in groups:
                for suffix, tensor in (("weight", stack.weight), ("bias", stack.bias)):
                    if len(parts) > 1 and isinstance(tensor, Tensor):
                        for name, part in zip(parts, torch.split(tensor, rows), strict=True):
                            views[f"model.layers.{i}.{name}.{suffix}"] = part
        return views

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @property
    def deterministic(self) -> bool:
        """Whether kernels over the head give a row the same bits for every number of rows."""
        return self.head.deterministic

    @property
    def kv_bytes_per_token(self) -> int:
        """Number of bytes that one token takes in the cache: keys and values of all layers."""
        return count_cache_values(self.config) * self.dtype.itemsize

    @property
    def attention_heads(self) -> tuple[int, int, int]:
        """Query heads, kv heads and head dim of the attention kernel."""
        c = self.config
        return c.num_attention_heads, c.num_key_value_heads, c.head_dim

    @property
    def state_bytes(self) -> int:
        """Number of bytes that a path takes beside its tokens: none."""
        return 0

    @property
    def weights_per_token(self) -> int:
        """Number of weights that every token is multiplied with; biases and norms are left out."""
        return count_weights(self.config)

    @property
    def values_per_token(self) -> int:
        """Number of values of one token that a forward pass holds at once: states, norms, heads, feed-forward."""
        return count_forward_values(self.config)

    def forward(
        self, ids_N: Tensor, batch: ForwardBatch, kv: Tensor, *, observed: list[Tensor] | None = None
    ) -> Tensor:
        """Extend the cache by N tokens and return their hidden states after the last norm, [N, D].

        They are divided by the family's divisor of the logits where it has one. Of a batch with `output_M`, only the
        states of these tokens, [M, D]; the others are computed up to the keys and values of the last layer. ids_N:
        int64. batch: where each token lies, and what it reads. kv: [L, 2, P, S, G, E]. observed: a list that the
        outputs of the last layer's up projection, [N, F], or [M, F], are appended to.
        """
        c = self.config
        angles = {rope: rotary_angles(batch.position_N, *pair) for rope, pair in self.frequencies.items()}
        next_norms = (*(layer.attention_norm for layer in self.layers[1:]), self.norm)
        x = select_rows(self.embedding, ids_N)
        if c.embedding_multiplier is not None:
            x = x * torch.tensor(c.embedding_multiplier, dtype=x.dtype)
        first = self.layers[0].attention_norm
        h = x if first is None else self._norm(x, first)
        for layer, cache, next_norm in zip(self.layers, kv, next_norms, strict=True):
            attended = self._attention(h, layer, cache, batch, angles)
            if layer is self.layers[-1] and batch.output_M is not None:
                attended, x = (rows.index_select(0, batch.output_M) for rows in (attended, x))
                if not len(x):
                    return x
            update = linear(attended, layer.output.weight, layer.output.bias)
            h, x = self._add(update, x, layer.attention_post_norm, layer.mlp_norm)
            fed = self._feed_forward(h, layer, observed if layer is self.layers[-1] else None)
            h, x = self._add(fed, x, layer.mlp_post_norm, next_norm)
        return self.head.divide(h)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.config.rms_norm_eps, offset=self.config.norm_offset)

    def _add(
        self, update_ND: Tensor, x_ND: Tensor, post_norm: Tensor | None, next_norm: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add to the residual stream x what a block returns; return what the next block reads, and the sum."""
        if post_norm is not None:
            update_ND = self._norm(update_ND, post_norm)
        if self.config.residual_multiplier is not None:
            update_ND = update_ND * self.config.residual_multiplier
        if next_norm is None:
            x_ND = x_ND + update_ND
            return x_ND, x_ND
        return add_rms_norm(update_ND, x_ND, next_norm, self.config.rms_norm_eps, offset=self.config.norm_offset)

    def _feed_forward(self, h_ND: Tensor, layer: LayerWeights, observed: list[Tensor] | None) -> Tensor:
        mlp, experts = layer.mlp, self.config.experts
        if isinstance(mlp, RoutedWeights):
            assert experts is not None
            logits = linear(h_ND, mlp.router.weight, mlp.router.bias)
            chosen, weights = route(
                logits, experts.per_token, normalize=experts.normalize, select_first=experts.select_first
            )
            return expert_mlp(h_ND, chosen, weights, mlp.experts, activation=self.activation)
        gate_up = linear(h_ND, mlp.gate_up.weight, mlp.gate_up.bias)
        if observed is not None:
            observed.append(gate_up[:, gate_up.shape[1] // 2 :])
        return linear(self.activation(gate_up), mlp.down.weight, mlp.down.bias)

    def _attention(
        self, h_ND: Tensor, layer: LayerWeights, cache: Tensor, batch: ForwardBatch, angles: Angles
    ) -> Tensor:
        c = self.config
        qkv = linear(h_ND, layer.qkv.weight, layer.qkv.bias)
        q_norm, k_norm = layer.q_norm, layer.k_norm
        if c.qk_norm == "width":
            assert q_norm is not None
            assert k_norm is not None
            q, k, v = torch.split(qkv, [len(q_norm), len(k_norm), len(k_norm)], dim=1)
            qkv = torch.cat([self._norm(q, q_norm), self._norm(k, k_norm), v], dim=1)
            q_norm = k_norm = None
        cos, sin = angles[layer.rope]
        k_pages, v_pages = cache
        q = write_kv(
            qkv.view(len(h_ND), qkv.shape[1] // c.head_dim, c.head_dim),
            cos,
            sin,
            k_pages,
            v_pages,
            batch.slot_N,
            heads=c.num_attention_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=c.rms_norm_eps,
            norm_offset=c.norm_offset,
        )
        if c.query_growth is not None:
            slope, length = c.query_growth
            growth_N = 1 + slope * torch.log1p(torch.floor(batch.position_N / length))
            q = q * growth_N[:, None, None].to(q.dtype)
        return paged_attention(
            q,
            k_pages,
            v_pages,
            batch.tables[layer.window],
            scale=c.attention_scale,
            softcap=c.attention_softcap,
            sinks_H=layer.sinks,
        ).flatten(1)


def _choose_activation(config: ModelConfig) -> Activation:
    if config.activation == "clamped":
        assert config.experts is not None
        return functools.partial(clamped_swiglu, alpha=config.experts.alpha, limit=config.experts.limit)
    return {"silu": swiglu, "gelu_tanh": geglu}[config.activation]


def _frequencies(config: ModelConfig, device: torch.device, directory: Path) -> dict[int | None, tuple[Tensor, float]]:
    """Return frequencies and factor of every rotary embedding. Raises CheckpointError on parameters that are wrong.

    Layers whose positions are not rotated are None; their angles are 0.
    """
    pairs: dict[int | None, tuple[Tensor, float]] = {}
    try:
        for i, rope in enumerate(config.ropes):
            frequency, factor = rope_frequencies(rope.parameters, rope.width, config.max_position_embeddings)
            pairs[i] = frequency.to(device), factor
    except ValueError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from None
    if None in config.layer_ropes:
        pairs[None] = torch.zeros(config.head_dim // 2, device=device), 1.0
    return pairs


def _vocabulary_tables(
    tensors: Mapping[str, Tensor], config: ModelConfig, directory: Path
) -> tuple[Tensor, Tensor | None]:
    """Return the embedding and the head, each [V, D]; None for a head that is the embedding.

    transformers' rule: where the config ties them, but the checkpoint has two that differ, they are not tied.
    """
    shape = (config.vocab_size, config.hidden_size)
    tied = config.tie_word_embeddings
    embedding = take(tensors, HEAD if tied and EMBEDDING not in tensors else EMBEDDING, shape, directory)
    if tied and HEAD not in tensors:
        return embedding, None
    head = take(tensors, HEAD, shape, directory)
    is_same = tied and (head.data_ptr() == embedding.data_ptr() or torch.equal(head, embedding))
    return embedding, None if is_same else head


def _prepare_tables(
    tensors: Mapping[str, Tensor], config: ModelConfig, directory: Path, prepare: Callable[[Tensor], Weight]
) -> tuple[Weight, Weight]:
    """Return embedding and head as the kernels take them; no other copy of them stays."""
    embedding, head = _vocabulary_tables(tensors, config, directory)
    if head is not None:
        return embedding, prepare(head)
    table = prepare(embedding)
    return table, table


def _unchanged(weight: Tensor) -> Weight:
    return weight
