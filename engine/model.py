"""One decoder for the Llama, Qwen2 and Qwen3 classes, over packed tokens and a paged key-value cache.

Shapes:  N packed tokens   D model width   V vocabulary   H query heads   G kv heads   E head dim   F feed-forward width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from genssd.engine.config import ModelConfig
from genssd.engine.errors import CheckpointError
from genssd.engine.forward_batch import ForwardBatch
from genssd.engine.parameters import EMBEDDING, HEAD, match_parameters, take
from genssd.engine.weights import WeightFiles
from genssd.kernels.activation import swiglu
from genssd.kernels.attention import paged_attention
from genssd.kernels.cache import write_kv
from genssd.kernels.linear import linear
from genssd.kernels.norm import add_rms_norm, rms_norm
from genssd.kernels.rotary import rope_frequencies, rotary_angles
from genssd.kernels.weight import Weight, pack_weight, select_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One transformer block; projections that read the same input are stacked into one matrix."""

    attention_norm: Tensor  # [D]
    qkv: Weight  # [(H + 2 G) E, D]
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # [E]
    k_norm: Tensor | None
    output: Weight  # [D, H E]
    output_bias: Tensor | None
    mlp_norm: Tensor  # [D]
    gate_up: Weight  # [2 F, D]
    gate_up_bias: Tensor | None
    down: Weight  # [D, F]
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The weights of a model and its forward pass, without cache and sequences."""

    config: ModelConfig
    embedding: Weight  # [V, D]
    head: Weight  # [V, D]; the embedding itself where they are tied
    norm: Tensor  # [D]
    layers: tuple[LayerWeights, ...]
    frequency: Tensor  # [E / 2]
    rope_factor: float
    deterministic: bool = True  # whether kernels over the head must give a row the same bits for every number of rows

    @staticmethod
    @torch.inference_mode()
    def load(directory: Path, dtype: torch.dtype, device: torch.device, *, deterministic: bool = True) -> Decoder:
        """Build from a Hugging Face directory. Raises CheckpointError on anything missing, misshapen or unsupported."""
        config, weights = ModelConfig.load(directory), WeightFiles.open(directory)
        tensors = weights.read(match_parameters(weights, config), dtype, device)
        decoder = Decoder.from_tensors(config, tensors, directory, frozen=True)
        return dataclasses.replace(decoder, deterministic=deterministic)

    @staticmethod
    def from_tensors(
        config: ModelConfig, tensors: Mapping[str, Tensor], directory: Path, *, frozen: bool = False
    ) -> Decoder:
        """Build from tensors by the names of a checkpoint; all but the stacked ones are used without a copy.

        frozen: the tensors never change; on the CPU the matrices are then packed for the kernels, which is a copy.
        directory: used in messages. Raises CheckpointError on a tensor that is missing or misshapen.
        """
        prepare = pack_weight if frozen else _unchanged
        embedding, separate_head = _vocabulary_tables(tensors, config, directory)
        if separate_head is None:
            table = head = prepare(embedding)
        else:
            table, head = embedding, prepare(separate_head)
        try:
            frequency, factor = rope_frequencies(
                config.rope_parameters, config.head_dim, config.max_position_embeddings
            )
        except ValueError as error:
            raise CheckpointError(f"{directory / 'config.json'}: {error}") from None
        return Decoder(
            config=config,
            embedding=table,
            head=head,
            norm=take(tensors, "model.norm.weight", (config.hidden_size,), directory),
            layers=tuple(_layer(tensors, config, i, directory, prepare) for i in range(config.num_hidden_layers)),
            frequency=frequency.to(embedding.device),
            rope_factor=factor,
        )

    def stacked(self) -> dict[str, Tensor]:
        """Return the parts of the stacked matrices by the names of a checkpoint, as views.

        Where a model under training uses them as its parameters, its updates reach this decoder without a copy. A
        frozen decoder has none.
        """
        c = self.config
        q, kv, f = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.intermediate_size
        views: dict[str, Tensor] = {}
        parts = {"self_attn": (("q", "k", "v"), [q, kv, kv]), "mlp": (("gate", "up"), [f, f])}
        for i, layer in enumerate(self.layers):
            for kind, suffix, stack in (
                ("self_attn", "weight", layer.qkv),
                ("self_attn", "bias", layer.qkv_bias),
                ("mlp", "weight", layer.gate_up),
                ("mlp", "bias", layer.gate_up_bias),
            ):
                names, rows = parts[kind]
                if isinstance(stack, Tensor):
                    for name, part in zip(names, torch.split(stack, rows), strict=True):
                        views[f"model.layers.{i}.{kind}.{name}_proj.{suffix}"] = part
        return views

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @property
    def kv_bytes_per_token(self) -> int:
        """Number of bytes that one token takes in the cache: keys and values of all layers."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.dtype.itemsize

    def forward(self, ids_N: Tensor, batch: ForwardBatch, kv: Tensor) -> Tensor:
        """Extend the cache by N tokens and return their hidden states after the last norm, [N, D].

        Of a batch with `output_M`, only the states of these tokens, [M, D]; the others are computed up to the keys and
        values of the last layer. ids_N: int64. batch: where each token lies, and what it reads. kv: [L, 2, P, S, G, E].
        """
        eps = self.config.rms_norm_eps
        cos, sin = rotary_angles(batch.position_N, self.frequency, self.rope_factor)
        next_norms = (*(layer.attention_norm for layer in self.layers[1:]), self.norm)
        x = select_rows(self.embedding, ids_N)
        h = rms_norm(x, self.layers[0].attention_norm, eps)
        for layer, cache, window, next_norm in zip(self.layers, kv, self.config.windows, next_norms, strict=True):
            attended = self._attention(h, layer, cache, window, batch, cos, sin)
            if layer is self.layers[-1] and batch.output_M is not None:
                attended, x = (rows.index_select(0, batch.output_M) for rows in (attended, x))
                if not len(x):
                    return x
            h, x = add_rms_norm(linear(attended, layer.output, layer.output_bias), x, layer.mlp_norm, eps)
            feed = linear(swiglu(linear(h, layer.gate_up, layer.gate_up_bias)), layer.down, layer.down_bias)
            h, x = add_rms_norm(feed, x, next_norm, eps)
        return h

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return the logits of the next tokens, float32 [N, V]."""
        out = hidden_ND.new_empty(hidden_ND.shape[0], self.head.shape[0], dtype=torch.float32)
        return linear(hidden_ND, self.head, out=out)

    def _attention(
        self,
        h_ND: Tensor,
        layer: LayerWeights,
        cache: Tensor,
        window: int,
        batch: ForwardBatch,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        c = self.config
        qkv = linear(h_ND, layer.qkv, layer.qkv_bias).view(len(h_ND), layer.qkv.shape[0] // c.head_dim, c.head_dim)
        k_pages, v_pages = cache
        q = write_kv(
            qkv,
            cos,
            sin,
            k_pages,
            v_pages,
            batch.slot_N,
            heads=c.num_attention_heads,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=c.rms_norm_eps,
        )
        return paged_attention(q, k_pages, v_pages, batch.tables[window], scale=c.head_dim**-0.5).flatten(1)


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


def _unchanged(weight: Tensor) -> Weight:
    return weight


def _joined(parts: list[Tensor]) -> Tensor:
    """Return the matrices stacked along the first dimension; a single one without a copy."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _layer(
    tensors: Mapping[str, Tensor], c: ModelConfig, index: int, directory: Path, prepare: Callable[[Tensor], Weight]
) -> LayerWeights:
    """Build one layer from the tensors of a checkpoint."""
    prefix = f"model.layers.{index}."
    q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def get(name: str, *shape: int) -> Tensor:
        return take(tensors, prefix + name, shape, directory)

    def stack(names: dict[str, int], inputs: int, biased: bool) -> tuple[Weight, Tensor | None]:
        weights = [get(f"{name}.weight", rows, inputs) for name, rows in names.items()]
        biases = [get(f"{name}.bias", rows) for name, rows in names.items()] if biased else []
        return prepare(_joined(weights)), _joined(biases) if biased else None

    attention = {"self_attn.q_proj": q_width, "self_attn.k_proj": kv_width, "self_attn.v_proj": kv_width}
    qkv, qkv_bias = stack(attention, c.hidden_size, c.qkv_bias)
    output, output_bias = stack({"self_attn.o_proj": c.hidden_size}, q_width, c.output_bias)
    feed = {"mlp.gate_proj": c.intermediate_size, "mlp.up_proj": c.intermediate_size}
    gate_up, gate_up_bias = stack(feed, c.hidden_size, c.mlp_bias)
    down, down_bias = stack({"mlp.down_proj": c.hidden_size}, c.intermediate_size, c.mlp_bias)
    return LayerWeights(
        attention_norm=get("input_layernorm.weight", c.hidden_size),
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=get("self_attn.q_norm.weight", c.head_dim) if c.qk_norm else None,
        k_norm=get("self_attn.k_norm.weight", c.head_dim) if c.qk_norm else None,
        output=output,
        output_bias=output_bias,
        mlp_norm=get("post_attention_layernorm.weight", c.hidden_size),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=down,
        down_bias=down_bias,
    )
