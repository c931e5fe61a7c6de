"""The parameters that a decoder has by its config, and the tensors of a checkpoint that fill them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from genssd.engine.config import ModelConfig
from genssd.engine.errors import CheckpointError
from genssd.engine.weights import UNUSED, WeightFiles

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OWN = ("model.", "lm_head.", "layers.", "embed_tokens.", "norm.")
"""Beginnings of the names of a decoder's own tensors; others belong to models around it."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a decoder by its name in a checkpoint."""
    c = config
    width, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    feed = c.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    for name, rows, inputs, biased in (
        ("self_attn.q_proj", q, width, c.qkv_bias),
        ("self_attn.k_proj", kv, width, c.qkv_bias),
        ("self_attn.v_proj", kv, width, c.qkv_bias),
        ("self_attn.o_proj", width, q, c.output_bias),
        ("mlp.gate_proj", feed, width, c.mlp_bias),
        ("mlp.up_proj", feed, width, c.mlp_bias),
        ("mlp.down_proj", width, feed, c.mlp_bias),
    ):
        layer[f"{name}.weight"] = (rows, inputs)
        if biased:
            layer[f"{name}.bias"] = (rows,)
    if c.qk_norm:
        layer |= {"self_attn.q_norm.weight": (c.head_dim,), "self_attn.k_norm.weight": (c.head_dim,)}
    table = (c.vocab_size, width)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table, "model.norm.weight": (width,), HEAD: table}
    for index in range(c.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def count_parameters(config: ModelConfig) -> int:
    """Return the number of values in a decoder's parameters; a head that is the embedding counts once."""
    shapes = parameter_shapes(config)
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return sum(math.prod(shape) for shape in shapes.values())


def match_parameters(weights: WeightFiles, config: ModelConfig) -> dict[str, str]:
    """Return the name in the weight files of each parameter. As in transformers, the prefix `model.` may be missing.

    Where embedding and head are tied, one of the two is enough. Raises CheckpointError naming file and tensor where a
    parameter is missing, misshapen, stored twice or of another data type, and on a tensor that the decoder lacks.
    """
    shapes = parameter_shapes(config)
    stored: dict[str, str] = {}
    strange: list[str] = []
    for name in weights.tensors:
        keys = (name, f"model.{name}", name.removeprefix("model."))
        key = next((key for key in keys if key in shapes), None)
        if key in stored:
            raise CheckpointError(f"{weights.tensors[name].file}: {name} and {stored[key]} are one parameter, {key}")
        if key is not None:
            stored[key] = name
        elif name.startswith(OWN) and not UNUSED.search(name):
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
