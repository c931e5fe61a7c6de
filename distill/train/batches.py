"""Batches of a training: examples, and the token tensors that one forward pass takes.

pad    one row per example, padded on the right
pack   all examples in one row, one after the other; no example attends to another
tree   like pack, but a prefix that several examples share is stored and computed once

With pack and tree, the attention mask takes T * T bytes.

Shapes:  B rows   T tokens of a row   M completion tokens of all examples, in the order of the examples
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from genssd.distill.answers.forms import Outcome
from genssd.distill.data.examples import Example
from genssd.distill.train.config import Layout
from genssd.engine.texts.text import common_prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleBatch:
    """Examples that are trained or evaluated together."""

    examples: Sequence[Example]
    on_policy: bool
    """Whether the student under training wrote the completions."""

    @property
    def num_completion(self) -> int:
        """Number of completion tokens."""
        return sum(example.num_completion for example in self.examples)

    @property
    def weight(self) -> float:
        """Sum of the weights of all completion tokens, by which the loss is divided; 1 where the sum is 0."""
        return sum(sum(example.token_weights()) for example in self.examples) or 1.0

    def split(self, size: int) -> list[ExampleBatch]:
        """Return the batch in parts of at most `size` examples.

        Completions of different verdicts are in different parts, and parts in which none is trained are left out, but
        for one where there is nothing else.
        """
        parts: list[ExampleBatch] = []
        for outcome in dict.fromkeys(example.outcome for example in self.examples):
            group = [example for example in self.examples if example.outcome == outcome]
            parts += [replace(self, examples=group[start : start + size]) for start in range(0, len(group), size)]
        trained = [part for part in parts if part.outcome is None or any(e.weight for e in part.examples)]
        return trained or parts[:1]

    @property
    def outcome(self) -> Outcome | None:
        """Verdict on all completions of a part; None where they are not judged."""
        return self.examples[0].outcome

    def select(self, outcome: Outcome) -> ExampleBatch:
        """Return the batch of the examples with a verdict."""
        return replace(self, examples=[example for example in self.examples if example.outcome == outcome])


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Token tensors of one forward pass, and which hidden state predicts each completion token."""

    input_ids: Tensor
    """Token ids, int64 [B, T]."""
    position_ids: Tensor
    """Position of each token in its own sequence, int64 [B, T]."""
    attention_mask: Tensor
    """Attention mask. Layout pad: int64 [B, T], 1 for a token, 0 for padding. Layouts pack and tree: bool [1, 1, T, T],
    True where a token (dim 2) attends to another (dim 3)."""
    source: Tensor
    """Index, among the B * T tokens, of the token before each completion token, int64 [M]."""
    target: Tensor
    """Token id of each completion token, int64 [M]."""

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch with all its tensors on a device."""
        return TokenBatch(**{name: getattr(self, name).to(device, non_blocking=True) for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids of a sequence, of which the first `num_prompt` are not trained."""

    ids: tuple[int, ...]
    num_prompt: int


def build_token_batch(rows: Sequence[TokenRow], layout: Layout, pad_id: int) -> TokenBatch:
    """Build the token tensors of sequences, each of at least one prompt token and one completion token."""
    return _pad_rows(rows, pad_id) if layout == "pad" else _join_rows(rows, share_prefixes=layout == "tree")


def _pad_rows(rows: Sequence[TokenRow], pad_id: int) -> TokenBatch:
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    sources = []
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        sources.append(i * width + torch.arange(row.num_prompt - 1, len(row.ids) - 1))
    return TokenBatch(
        input_ids=ids,
        position_ids=torch.arange(width).expand(len(rows), -1).contiguous(),
        attention_mask=mask,
        source=torch.cat(sources),
        target=_join_targets(rows),
    )


def _join_targets(rows: Sequence[TokenRow]) -> Tensor:
    """Return the completion tokens of all rows, int64 [M]."""
    return torch.tensor([token for row in rows for token in row.ids[row.num_prompt :]])


def _join_rows(rows: Sequence[TokenRow], *, share_prefixes: bool) -> TokenBatch:
    """Join the sequences into one row.

    With share_prefixes they are placed in lexicographic order, in which the longest shared prefix of a sequence is the
    one that it shares with the sequence before it.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i].ids) if share_prefixes else list(range(len(rows)))
    length = sum(len(row.ids) for row in rows)
    mask: npt.NDArray[np.bool_] = np.zeros((length, length), dtype=np.bool_)
    ids: list[int] = []
    positions: list[int] = []
    places: dict[int, npt.NDArray[np.int64]] = {}  # by sequence: where its tokens are in the joined row
    previous_ids: tuple[int, ...] = ()
    previous_places: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
    for i in order:
        row = rows[i]
        # nothing attends to the last token of a sequence, but it may lie in the middle of the next sequence
        common = common_prefix(previous_ids, row.ids) if share_prefixes else 0
        start, new = len(ids), len(row.ids) - common
        if common:
            mask[start : start + new, :start] = mask[previous_places[common - 1], :start]
        mask[start : start + new, start : start + new] = np.tri(new, dtype=np.bool_)
        ids += row.ids[common:]
        positions += range(common, len(row.ids))
        places[i] = np.concatenate((previous_places[:common], np.arange(start, start + new)))
        previous_ids, previous_places = row.ids, places[i]
    sources = [places[i][row.num_prompt - 1 : -1] for i, row in enumerate(rows)]
    used = len(ids)
    return TokenBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=torch.from_numpy(mask[:used, :used].copy())[None, None],
        source=torch.from_numpy(np.concatenate(sources)),
        target=_join_targets(rows),
    )
