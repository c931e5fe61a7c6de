"""Token-level selection: the student may refuse every single token (Reverse Speculative Decoding, 2509.22230).

The teacher draws a token; the student accepts it when it ranks among its likeliest and is likely enough. After a few
refused tries the student writes the token itself. Both models read every token, so they decode in lockstep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from genssd.engine.errors import InputError
from genssd.engine.expander import Drawn, Expander, Expansion, Lane, nonfinite
from genssd.engine.runner import ModelRunner
from genssd.engine.sampling import Sampling, attempt_key
from genssd.kernels.logprob import NonFiniteLogits, linear_logprob
from genssd.kernels.sampling import sample


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseSpeculation:
    """What the student accepts, and how it writes where it does not. The defaults are the paper's."""

    probability: float = 0.01
    """Least probability of an accepted token: the student's, at temperature 1 over the whole vocabulary."""
    top: int = 20
    """An accepted token ranks among so many of the student's likeliest."""
    tries: int = 5
    """Tokens that the teacher draws before the student writes."""
    student: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_k=20, top_p=0.95))
    """How the student writes."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise InputError(f"rsd: probability must lie in [0, 1], not {self.probability}")
        if self.top < 1 or self.tries < 1:
            raise InputError(f"rsd: top and tries must be at least 1, not {self.top} and {self.tries}")


class ReverseSpeculator(Expander):
    """Runs expansions in which the scorer follows the writer token by token."""

    def __init__(self, rules: ReverseSpeculation, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._rules = rules

    @property
    def _student(self) -> ModelRunner:
        assert self._scorer is not None
        return self._scorer

    def _open_kid(self, lane: Lane) -> Lane:
        opened = super()._open_kid(lane)
        if lane.kid is None:
            path = lane.expansion.parent.student.path
            assert path is not None
            opened.branch.student.path = self._student.tree.fork(path)
        return opened

    def _take_token(self, lane: Lane, token: int, logprob: float, hidden: Tensor | None) -> None:
        super()._take_token(lane, token, logprob, hidden)
        lane.branch.student.pending = [token]

    def _sample(self, batch: list[Lane], source: Tensor, kids: list[Lane]) -> Drawn:
        device = self._writer.decoder.device
        source = source.to(device)
        proposing = self._writer.logits(torch.stack([self._hidden(self._writer, lane) for lane in batch]))[source]
        judging = torch.stack([self._hidden(self._student, lane) for lane in batch])[source]
        tokens = torch.empty(len(kids), dtype=torch.int64, device=device)
        refused = torch.arange(len(kids), device=device)
        for attempt in range(self._rules.tries):
            drawn = self._propose(self._writer, proposing[refused], refused, kids, attempt, self._sampling)
            tokens[refused] = drawn
            refused = refused[~self._accepts(judging[refused], drawn, refused, kids)]
            if not len(refused):
                break
        else:
            own = self._student.logits(judging[refused])
            tokens[refused] = self._propose(self._student, own, refused, kids, self._rules.tries, self._rules.student)
            for row in refused.tolist():
                kids[row].branch.substituted += 1
        logprob = proposing.gather(1, tokens[:, None])[:, 0] - proposing.logsumexp(1)
        return Drawn(tokens.tolist(), logprob.tolist())

    def _propose(
        self, runner: ModelRunner, logits: Tensor, rows: Tensor, kids: list[Lane], attempt: int, options: Sampling
    ) -> Tensor:
        lanes = [kids[row] for row in rows.tolist()]
        keys = [attempt_key(lane.branch.stream, lane.branch.length, attempt) for lane in lanes]
        try:
            return sample(
                logits[:, : self._vocabulary],
                torch.tensor(keys, device=logits.device),
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                min_p=options.min_p,
            )
        except NonFiniteLogits as error:
            raise nonfinite(runner, lanes[error.row].expansion.label, lanes[error.row].branch.length) from None

    def _accepts(self, hidden: Tensor, tokens: Tensor, rows: Tensor, kids: list[Lane]) -> Tensor:
        """bool [rows]: whether the student takes the tokens."""
        try:
            stats = linear_logprob(hidden, self._student.decoder.head, tokens)
        except NonFiniteLogits as error:
            lane = kids[int(rows[error.row])]
            raise nonfinite(self._student, lane.expansion.label, lane.branch.length) from None
        least = math.log(self._rules.probability) if self._rules.probability else -math.inf
        return (stats.logprob >= least) & (stats.rank <= self._rules.top)

    def _score(self, scorer: ModelRunner, complete: list[Expansion]) -> None:
        """Nothing: the student has judged token by token."""
