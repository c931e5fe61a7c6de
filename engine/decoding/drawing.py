"""How the next token of every candidate is drawn: the part of a decoding step that differs between searches.

By default the writing model draws alone (`WriterDrawing`); in reverse speculation the student may refuse its tokens
(see reverse_speculation.py).

Shapes:  L lanes   C candidates   D model width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.expansion import Lane
from genssd.engine.host.threads import computes
from genssd.engine.models.pending_read import PendingRead
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.sampling import Sampling, noise_keys
from genssd.engine.models.state_rows import StateRow, gather
from genssd.engine.models.token_runs import nonfinite_logits, response_place
from genssd.kernels.device_table import upload
from genssd.kernels.head import row_logsumexp
from genssd.kernels.logprob import TopK
from genssd.kernels.sampling import sample

GREEDY = Sampling(temperature=0.0)


class Drawn(NamedTuple):
    """The next token of every candidate, and its log-probability at temperature 1."""

    tokens: list[int]
    logprob: list[float]
    hidden_CD: Tensor | None = None
    """Hidden states of the writing model after the tokens, where it has read them already."""


class Drawing(Protocol):
    """A way to draw the next token of every candidate."""

    @property
    def writer(self) -> ModelRunner:
        """The model whose log-probabilities of the drawn tokens are recorded."""
        ...

    @property
    def readers(self) -> Sequence[ModelRunner]:
        """The models, writer included, that read every drawn token before the next one is drawn."""
        ...

    def draw(self, lanes: Sequence[Lane], source_C: Tensor, candidates: Sequence[Lane]) -> Drawn:
        """Draw a token for every candidate. source: int64, the index of the lane that a candidate comes from."""
        ...


class WriterDrawing:
    """Drawing by the writing model without the student.

    num_topk: how many of its most likely tokens are kept later. greedy_first: whether the first candidate of every
    expansion takes the most likely tokens, whatever the sampling of the others.
    """

    def __init__(
        self,
        writer: ModelRunner,
        sampling: Sampling,
        *,
        vocabulary: int,
        num_topk: int = 0,
        greedy_first: bool = False,
    ) -> None:
        self.writer = writer
        self.readers = (writer,)
        self._sampling = sampling
        self._greedy_first = greedy_first
        self._vocabulary = vocabulary
        self._num_topk = num_topk

    def draw(self, lanes: Sequence[Lane], source_C: Tensor, candidates: Sequence[Lane]) -> Drawn:
        """Draw a token for every candidate, and let the writer read it at once where the device works by itself.

        There the next step is queued before the host knows the tokens of this one, also for candidates that turn out
        to be complete: their last token is what they would have pending.
        """
        writer = self.writer
        tokens_C, logprob_C = self._draw(lanes, source_C, candidates)
        arriving, arriving_logprob, hidden_CD = PendingRead(tokens_C), PendingRead(logprob_C), None
        if writer.runs_ahead:
            paths = [path for lane in candidates if (path := lane.branch.state(writer.role).path) is not None]
            # a row without a token, whose logits are not finite, reads any: the error follows
            hidden_CD = writer.run(writer.prepare(paths, [1] * len(paths)), tokens_C.clamp_min(0))
        tokens, logprob = arriving.tolist(), arriving_logprob.tolist()
        for lane, token in zip(candidates, tokens, strict=True):
            if token < 0:
                raise nonfinite_logits(writer, response_place(lane.expansion.label, lane.branch.length))
        return Drawn(tokens, logprob, hidden_CD)

    def _draw(self, lanes: Sequence[Lane], source_C: Tensor, candidates: Sequence[Lane]) -> tuple[Tensor, Tensor]:
        """Return tokens and their log-probabilities at temperature 1, on the device; -1 where logits are not finite."""
        hidden_LD = hidden_of(self.writer, lanes)
        if self._num_topk:
            for lane, row in zip(candidates, source_C.tolist(), strict=True):
                lane.branch.chunk_states.append(StateRow(hidden_LD, row))
        branches = [lane.branch for lane in candidates]
        keys = noise_keys([branch.stream for branch in branches], [branch.length for branch in branches])
        is_greedy = np.array(
            [self._greedy_first and lane.branch is lane.expansion.children[0] for lane in candidates], dtype=bool
        )
        if not is_greedy.any():
            return self._draw_rows(hidden_LD, source_C.numpy(), keys, self._sampling)
        groups = ((np.flatnonzero(is_greedy), GREEDY), (np.flatnonzero(~is_greedy), self._sampling))
        drawn = [
            self._draw_rows(hidden_LD, source_C.numpy()[rows], keys[rows], sampling)
            for rows, sampling in groups
            if len(rows)
        ]
        place_C = upload(np.argsort(np.concatenate([rows for rows, _ in groups])), hidden_LD.device)
        tokens, logprobs = zip(*drawn, strict=True)
        return torch.cat(tokens)[place_C], torch.cat(logprobs)[place_C]

    def _draw_rows(
        self, hidden_LD: Tensor, source: NDArray[np.int64], keys: NDArray[np.int64], sampling: Sampling
    ) -> tuple[Tensor, Tensor]:
        """Draw one token for each of C rows, by the lane and the noise key of each. Returns what `_draw` returns."""
        keys_C, source_C = upload(keys, hidden_LD.device), upload(source, hidden_LD.device)
        if not sampling.filters:
            return self.writer.decoder.head.draw(
                hidden_LD.index_select(0, source_C),
                keys_C,
                temperature=sampling.temperature,
                vocabulary=self._vocabulary,
            )
        if len(source) <= len(hidden_LD):
            logits_CV = self.writer.logits(hidden_LD.index_select(0, source_C))
        else:
            logits_CV = self.writer.logits(hidden_LD).index_select(0, source_C)
        tokens_C = draw_filtered(logits_CV[:, : self._vocabulary], keys_C, sampling, checked=False)
        return tokens_C, logprob_of(logits_CV, tokens_C.clamp_min(0))


def hidden_of(runner: ModelRunner, lanes: Sequence[Lane]) -> Tensor:
    """Return the hidden states that predict the next token of every lane under one model, [L, D]."""
    states = [state for lane in lanes if (state := lane.branch.state(runner.role).hidden) is not None]
    assert len(states) == len(lanes), "a lane was not computed"
    return gather(states)


def draw_filtered(logits_CV: Tensor, keys_C: Tensor, sampling: Sampling, *, checked: bool) -> Tensor:
    """Draw a token from every row of logits, int64 [C].

    checked: raise NonFiniteLogits on a row without a finite maximum, which waits for the device; else its token is -1.
    """
    return sample(
        logits_CV,
        keys_C,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        checked=checked,
    )


def logprob_of(logits_CV: Tensor, tokens_C: Tensor) -> Tensor:
    """Return the log-probability of one token in every row of logits, [C]."""
    return logits_CV.gather(1, tokens_C[:, None])[:, 0] - row_logsumexp(logits_CV, 1.0, None)


@computes
def chunk_topk(writer: ModelRunner, branch: Branch, num_topk: int) -> TopK | None:
    """Return the writer's most likely tokens at every position of a branch's chunk; None where they are not kept."""
    if not num_topk or not branch.chunk:
        return None
    hidden = torch.stack([state.tensor() for state in branch.chunk_states])
    targets = torch.tensor(branch.chunk, device=writer.decoder.device)
    return writer.decoder.head.score(hidden, targets, topk=num_topk).topk
