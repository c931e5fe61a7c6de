"""transformers' cache of one path, which paths that fork from it share until they go on.

Keys and values lie in parts, in the order of positions; the past that two paths share is held once, as the pages of the
branch tree count it. States of recurrent layers and of convolutions are overwritten by every token, so every path that
goes on has its own; they cannot be cut back, and nothing here is ever rewound.

Shapes:  G kv heads   N new tokens   T tokens that are read   E head dim
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

Part = tuple[Tensor, Tensor]
"""Keys and values of consecutive tokens, [1, G, tokens, E] each; never written to."""


class _Parts:
    """The keys and values of an attention layer; mixed into the layer classes of transformers.

    A layer with a sliding window keeps the tokens before the window as well, so that forks share them, and reads those
    in the window alone.
    """

    _parts: tuple[Part, ...] = ()
    """The past that forks share."""
    _tail: Part | None = None
    """The tokens after it."""
    _length = 0
    """Number of tokens in all."""
    _window: int | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Part:
        """Append the keys and values of N tokens, [1, G, N, E]; return those that the tokens read, [1, G, T, E]."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        new = key_states, value_states
        self._tail = new if self._tail is None else _join([self._tail, new])
        num_seen = self._length if self._window is None else min(self._length, self._window - 1)
        self._length += key_states.shape[-2]
        return self._read(num_seen + key_states.shape[-2])

    def seal(self) -> None:
        """Move all tokens to the past that forks share."""
        if self._tail is not None:
            self._parts, self._tail = (*self._parts, self._tail), None

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens a query reads at most, itself included, and the position of the first."""
        num_seen = self._length if self._window is None else min(self._length, self._window - 1)
        return num_seen + query_length, self._length - num_seen

    @property
    def keys(self) -> Tensor | None:
        """Keys of all tokens, [1, G, T, E], as models read them that share keys between layers."""
        return self._read(self._length)[0] if self._length else None

    @keys.setter
    def keys(self, value: None) -> None:
        assert value is None, "keys are appended by update alone"

    @property
    def values(self) -> Tensor | None:
        """Values of all tokens, [1, G, T, E]."""
        return self._read(self._length)[1] if self._length else None

    @values.setter
    def values(self, value: None) -> None:
        assert value is None, "values are appended by update alone"

    def _read(self, count: int) -> Part:
        """Return the keys and values of the last tokens."""
        chosen: list[Part] = []
        for keys, values in reversed((*self._parts, *(() if self._tail is None else (self._tail,)))):
            if count <= 0:
                break
            chosen.append((keys[:, :, -count:], values[:, :, -count:]))
            count -= keys.shape[-2]
        return _join(chosen[::-1])


class SharedLayer(_Parts, DynamicLayer):  # type: ignore[misc]  # keys are a property here
    """A layer of full attention."""


class SharedSlidingLayer(_Parts, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer of attention within a sliding window."""


class SharedHybridLayer(_Parts, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer of full attention beside a recurrent one."""


class SharedHybridSlidingLayer(_Parts, LinearAttentionAndSlidingWindowAttentionLayer):  # type: ignore[misc]
    """A layer of attention within a sliding window beside a recurrent one."""


SHARED: Mapping[type, type] = {
    DynamicLayer: SharedLayer,
    DynamicSlidingWindowLayer: SharedSlidingLayer,
    LinearAttentionAndFullAttentionLayer: SharedHybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: SharedHybridSlidingLayer,
}
"""The class in place of each class of attention layers. Other layers are copied whole where a path forks."""


def make_cache(config: Any) -> DynamicCache:
    """Return the empty cache of a path. config: transformers' config of the model, or of its text part."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers = [_share(layer) for layer in cache.layers]
    return cache


def fork_cache(cache: DynamicCache) -> DynamicCache:
    """Return the cache of a second path with the same tokens; both can go on."""
    forked = copy.copy(cache)
    forked.layers = []
    for layer in cache.layers:
        shared: dict[int, Any] = {}
        if isinstance(layer, _Parts):
            layer.seal()
            shared[id(layer._parts)] = layer._parts
        forked.layers.append(copy.deepcopy(layer, shared))
    return forked


def count_bytes(cache: DynamicCache) -> int:
    """Return the number of bytes of the tensors in a cache, shared ones included."""
    tensors = {id(tensor): tensor for layer in cache.layers for tensor in _iter_tensors(vars(layer))}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim)


def has_states(config: Any) -> bool:
    """Return whether a model has layers whose state every token overwrites: recurrent ones and convolutions."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def _share(layer: Any) -> Any:
    """Return a layer that shares its keys and values in place of one that copies them."""
    kind = SHARED.get(type(layer))
    if kind is None:
        return layer
    shared: Any = object.__new__(kind)
    vars(shared).update({name: value for name, value in vars(layer).items() if name not in ("keys", "values")})
    shared._window = getattr(layer, "sliding_window", None)
    return shared


def _join(parts: list[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    keys, values = zip(*parts, strict=True)
    return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)


def _iter_tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _iter_tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _iter_tensors(part)
