"""Examples laid out for one forward pass.

pad    one row per example, padded on the right
pack   all examples in one row, one behind the other; none sees another
tree   as pack, and what examples have in common from their beginning on is there, and computed, once

pack and tree say who sees whom in a mask of T * T bytes.

Shapes:  B rows   T tokens of a row   M completion tokens of all examples, in their order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genssd.engine.text import common_prefix

Layout = Literal["pad", "pack", "tree"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Where every token stands, and which state predicts each completion token."""

    input_ids: Tensor
    """int64 [B, T]"""
    position_ids: Tensor
    """int64 [B, T]"""
    attention_mask: Tensor
    """pad: int64 [B, T], 1 where there is a token. pack, tree: bool [1, 1, T, T], True where a token (dim 2) sees
    another (dim 3)."""
    source: Tensor
    """int64 [M]: the place, among the B * T, of the token in front of each completion token."""
    target: Tensor
    """int64 [M]"""

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: getattr(self, name).to(device, non_blocking=True) for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids, of which the first `num_prompt` are not trained."""

    ids: tuple[int, ...]
    num_prompt: int


def lay_out(sequences: Sequence[TokenRow], layout: Layout, pad_id: int) -> Batch:
    """A batch of sequences, each of at least one prompt and one completion token."""
    return _padded(sequences, pad_id) if layout == "pad" else _tree(sequences, shared=layout == "tree")


def _padded(sequences: Sequence[TokenRow], pad_id: int) -> Batch:
    width = max(len(sequence.ids) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    sources = []
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        mask[row, : len(sequence.ids)] = 1
        sources.append(row * width + torch.arange(sequence.num_prompt - 1, len(sequence.ids) - 1))
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(width).expand(len(sequences), -1).contiguous(),
        attention_mask=mask,
        source=torch.cat(sources),
        target=_targets(sequences),
    )


def _targets(sequences: Sequence[TokenRow]) -> Tensor:
    return torch.tensor([token for sequence in sequences for token in sequence.ids[sequence.num_prompt :]])


def _tree(sequences: Sequence[TokenRow], *, shared: bool) -> Batch:
    """One row. Sequences are placed in lexicographic order, so that each can share with the one before it alone."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].ids) if shared else list(range(len(sequences)))
    length = sum(len(sequence.ids) for sequence in sequences)
    sees: npt.NDArray[np.bool_] = np.zeros((length, length), dtype=np.bool_)
    ids: list[int] = []
    positions: list[int] = []
    places: dict[int, npt.NDArray[np.int64]] = {}  # of each sequence's tokens
    before: tuple[tuple[int, ...], npt.NDArray[np.int64]] = ((), np.empty(0, dtype=np.int64))
    for i in order:
        sequence = sequences[i]
        # the last token of a sequence is read by nobody, but it may be the middle of the next one
        common = common_prefix(before[0], sequence.ids) if shared else 0
        start, new = len(ids), len(sequence.ids) - common
        if common:
            sees[start : start + new, :start] = sees[before[1][common - 1], :start]
        sees[start : start + new, start : start + new] = np.tri(new, dtype=np.bool_)
        ids += sequence.ids[common:]
        positions += range(common, len(sequence.ids))
        places[i] = np.concatenate((before[1][:common], np.arange(start, start + new)))
        before = (sequence.ids, places[i])
    sources = [places[i][sequence.num_prompt - 1 : -1] for i, sequence in enumerate(sequences)]
    used = len(ids)
    return Batch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=torch.from_numpy(sees[:used, :used].copy())[None, None],
        source=torch.from_numpy(np.concatenate(sources)),
        target=_targets(sequences),
    )
