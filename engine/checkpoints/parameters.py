"""The parameters that a decoder has by its config, and the tensors of a checkpoint that fill them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from genssd.engine.checkpoints.basic_config import is_supported
from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.config_files import read_config
from genssd.engine.checkpoints.weights import UNUSED, StoredTensor, WeightFiles
from genssd.engine.checkpoints.wrappers import text_name
from genssd.engine.common.errors import CheckpointError
from genssd.engine.families.shape import Experts

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OWN = ("model.", "lm_head.", "layers.", "embed_tokens.", "norm.")
"""Beginnings of the names of a decoder's own tensors; others belong to models around it."""
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
"""Names of the tensors that hold the projections of all experts of a layer."""

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a decoder by its name in a checkpoint."""
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table, "model.norm.weight": table[1:], HEAD: table}
    for index in range(config.num_hidden_layers):
        layer = (*_attention_shapes(config), *_feed_forward_shapes(config, index))
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer}
    return shapes


def _attention_shapes(c: ModelConfig) -> Shapes:
    """Yield the parameters of a layer's attention and of all its norms."""
    width, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    names = c.names
    for norm in (names.attention_norm, names.attention_post_norm, names.mlp_norm, names.mlp_post_norm):
        if norm is not None:
            yield f"{norm}.weight", (width,)
    rows = (q, kv, kv) if len(names.qkv) == 3 else (q + 2 * kv,)
    for name, count in zip(names.qkv, rows, strict=True):
        yield from _projection(name, count, width, biased=c.qkv_bias)
    yield from _projection(names.output, width, q, biased=c.output_bias)
    if c.qk_norm is not None:
        yield "self_attn.q_norm.weight", (c.head_dim if c.qk_norm == "head" else q,)
        yield "self_attn.k_norm.weight", (c.head_dim if c.qk_norm == "head" else kv,)
    if c.sinks:
        yield "self_attn.sinks", (c.num_attention_heads,)


def _feed_forward_shapes(c: ModelConfig, index: int) -> Shapes:
    """Yield the parameters of a layer's feed-forward block."""
    if c.experts is not None and c.experts.layers[index]:
        yield from _expert_shapes(c, c.experts)
        return
    width, feed = c.hidden_size, c.intermediate_size
    rows = feed if len(c.names.gate_up) == 2 else 2 * feed
    for name in c.names.gate_up:
        yield from _projection(name, rows, width, biased=c.mlp_bias)
    yield from _projection(c.names.down, width, feed, biased=c.mlp_bias)


def _expert_shapes(c: ModelConfig, experts: Experts) -> Shapes:
    """Yield the parameters of a layer's router and experts."""
    names, width, feed, count = c.names.experts, c.hidden_size, experts.intermediate_size, experts.count
    yield from _projection(names.router, count, width, biased=experts.biased)
    if names.parts is not None:
        for part, shape in zip(names.parts, ((feed, width), (feed, width), (width, feed)), strict=True):
            for expert in range(count):
                yield f"{part.format(expert)}.weight", shape
        return
    yield GATE_UP, (count, width, 2 * feed)
    yield DOWN, (count, feed, width)
    if experts.biased:
        yield f"{GATE_UP}_bias", (count, 2 * feed)
        yield f"{DOWN}_bias", (count, width)


def _projection(name: str, rows: int, inputs: int, *, biased: bool) -> Shapes:
    yield f"{name}.weight", (rows, inputs)
    if biased:
        yield f"{name}.bias", (rows,)


def count_parameters(config: ModelConfig) -> int:
    """Return the number of values in a decoder's parameters; a head that is the embedding counts once."""
    shapes = parameter_shapes(config)
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return sum(math.prod(shape) for shape in shapes.values())


def count_stored_parameters(directory: Path) -> int:
    """Return the number of values in the parameters of a checkpoint of any class, by its config or its weight files.

    Raises CheckpointError on a directory that cannot be used.
    """
    if is_supported(read_config(directory)):
        return count_parameters(ModelConfig.load(directory))
    return sum(stored.num_elements for stored in model_tensors(WeightFiles.open(directory)))


def model_tensors(weights: WeightFiles) -> list[StoredTensor]:
    """Return the tensors of a checkpoint of any class that its language model may have."""
    return [stored for name, stored in weights.tensors.items() if not UNUSED.search(name)]


def count_weights(config: ModelConfig) -> int:
    """Return the number of weights that a model multiplies with for every token; biases and norms are left out."""
    c = config
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    widths = [c.intermediate_size] * c.num_hidden_layers
    if c.experts is not None:
        routed = c.experts.per_token * c.experts.intermediate_size
        widths = [routed if has_experts else c.intermediate_size for has_experts in c.experts.layers]
    feed_forward = 3 * c.hidden_size * sum(widths)
    return c.num_hidden_layers * attention + feed_forward + c.vocab_size * c.hidden_size


def count_cache_values(config: ModelConfig) -> int:
    """Return the number of values that one token takes in the cache: keys and values of all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def count_forward_values(config: ModelConfig) -> int:
    """Return how many values of one token a forward pass holds at once: states, norms, heads, feed-forward."""
    c = config
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    feed = c.intermediate_size
    if c.experts is not None:
        feed = max(feed, c.experts.per_token * (c.experts.intermediate_size + c.hidden_size))
    return 6 * c.hidden_size + heads + 3 * feed


def match_parameters(weights: WeightFiles, config: ModelConfig) -> dict[str, str]:
    """Return the name in the weight files of each parameter. As in transformers, the prefix `model.` may be missing.

    Where embedding and head are tied, one of the two is enough. Raises CheckpointError naming file and tensor where a
    parameter is missing, misshapen, stored twice or of another data type, and on a tensor that the decoder lacks.
    """
    shapes = parameter_shapes(config)
    stored: dict[str, str] = {}
    strange: list[str] = []
    for name in weights.tensors:
        own = text_name(name) if config.is_wrapped else name
        keys = (own, f"model.{own}", own.removeprefix("model."))
        key = next((key for key in keys if key in shapes), None)
        if key in stored:
            raise CheckpointError(f"{weights.tensors[name].file}: {name} and {stored[key]} are one parameter, {key}")
        if key is not None:
            stored[key] = name
        elif own.startswith(OWN) and not UNUSED.search(name):
            strange.append(name)
    optional = {EMBEDDING, HEAD} if config.tie_word_embeddings and {EMBEDDING, HEAD} & stored.keys() else set()
    for key, shape in shapes.items():
        if key not in stored:
            if key in optional:
                continue
            raise CheckpointError(f"{weights.directory}: the weights have no tensor {key}")
        check_shape(stored[key], weights.tensors[stored[key]].shape, shape, weights.directory)
        weights.check_dtype(stored[key])
    if strange:
        file = weights.tensors[strange[0]].file
        raise CheckpointError(
            f"{file} has a tensor {strange[0]} that a {config.model_type} model of this config.json does not have"
        )
    return stored


def take(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], directory: Path) -> Tensor:
    """Return the named tensor. Raises CheckpointError when it is missing or has another shape."""
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{directory}: the weights have no tensor {name}")
    check_shape(name, tuple(tensor.shape), shape, directory)
    return tensor


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...], directory: Path) -> None:
    """Check the shape of a parameter. Raises CheckpointError when it is another one than expected."""
    if shape != expected:
        raise CheckpointError(f"{directory}: {name} has shape {shape}, config.json implies {expected}")
