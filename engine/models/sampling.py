"""Sampling options, and the random stream of each branch.

The noise of a token is keyed by (seed, prompt, number of equal prompts before it, branch, position) and nothing else:
not by the batch, the order of prompts, the page layout or a restart. A branch's first child inherits its stream, the
others get streams of their own; so with one candidate per round the search draws exactly what `generate` draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.kernels.options import check_options

_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Temperature and filters of a draw, applied in the order of transformers: temperature, top_k, top_p, min_p."""

    temperature: float = 1.0
    """Divisor of the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Probability that the kept, most likely tokens have together; 1 keeps all tokens."""
    top_k: int = 0
    """How many of the most likely tokens are kept; 0 keeps all tokens."""
    min_p: float = 0.0
    """Minimum probability of a kept token, relative to the most likely one; 0 keeps all tokens."""

    def __post_init__(self) -> None:
        check_types(self)
        try:
            check_options(self.temperature, self.top_k, self.top_p, self.min_p)
        except ValueError as error:
            raise InputError(str(error)) from None

    @property
    def filters(self) -> bool:
        """Whether any token may be removed before the draw."""
        return self.temperature > 0.0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


def prompt_stream(seed: int, prompt_ids: Sequence[int], occurrence: int) -> int:
    """Return the 64-bit stream of a prompt. occurrence: number of equal prompts before it."""
    digest = blake2b(f"{seed}:{occurrence}:".encode(), digest_size=8)
    digest.update(",".join(map(str, prompt_ids)).encode())
    return int.from_bytes(digest.digest(), "little")


def child_stream(stream: int, position: int, index: int) -> int:
    """Return the stream of the index-th candidate that branches off at a position."""
    return stream if index == 0 else _mix(_mix(stream ^ _mix(position)) + index)


def forced_stream(stream: int, response: int, position: int, token: int) -> int:
    """Return the stream of the completions after a token that is forced into one of the responses to a prompt."""
    key = f"forced:{stream}:{response}:{position}:{token}"
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")


def noise_key(stream: int, position: int) -> int:
    """Return the key of one token's noise, as a signed 64-bit integer."""
    key = _mix(stream + _mix(position + 1))
    return key - (1 << 64) if key >> 63 else key


def noise_keys(streams: Sequence[int], positions: Sequence[int]) -> NDArray[np.int64]:
    """Return the `noise_key` of every pair of a stream and a position, int64."""
    after = np.array(positions, dtype=np.uint64) + np.uint64(1)
    return _mix_words(np.array(streams, dtype=np.uint64) + _mix_words(after)).view(np.int64)


def attempt_key(stream: int, position: int, attempt: int) -> int:
    """Return the key of a repeated draw at one position; that of attempt 0 is `noise_key`."""
    key = noise_key(stream, position)
    if attempt == 0:
        return key
    key = _mix(_mix(key & _WORD) + attempt)
    return key - (1 << 64) if key >> 63 else key


def uniform(stream: int, position: int) -> float:
    """Return a number in [0, 1) from a stream, independent of the tokens' noise."""
    return (_mix(_mix(stream) ^ _mix(~position & _WORD)) >> 11) * 2.0**-53


def choice_uniform(stream: int, position: int) -> float:
    """Return a number in (0, 1) for the choice among candidates, independent of `uniform` and of the tokens' noise.

    position: that of the candidate's first token.
    """
    return ((_mix(_mix(_mix(stream) + 1) ^ _mix(~position & _WORD)) >> 11) + 0.5) * 2.0**-53


def _mix(word: int) -> int:
    """Apply the finaliser of SplitMix64 (Steele et al., 2014), a bijection of 64-bit words."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _mix_words(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply `_mix` to every word; sums and products of arrays wrap without a warning."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
