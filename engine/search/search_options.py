"""The options of the search, as one value and as the keywords of `Engine.select_expand`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

from genssd.engine.common.closest import suggest_or_list
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_count, check_types
from genssd.engine.criteria.criterion import AnyCriterion, not_in_search
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.search.budget import Budget
from genssd.engine.texts.loops import LoopGuard
from genssd.engine.texts.stops import StopStrings

Unlearnable = Literal["stop", "resample", "shorten", "accept_best", "ask_teacher"]
"""What the search does when no candidate of a round is acceptable: see policies.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Options of the search in which the teacher writes candidates and the student chooses among them."""

    candidates: int = 4
    """Number of continuations sampled per live branch and round; of several teachers, from each."""
    chunk: Chunk = Chunk()
    """Rule by which a candidate ends: the piece of a response that the student judges at once. In Python, a number
    stands for Chunk(tokens=number)."""
    beam: int = 1
    """Number of branches kept per prompt after each round."""
    criterion: str | AnyCriterion = "ppl"
    """Selection criterion: a registered name ("rsr"), one with options ("ppl(norm='byte')"), a weighted sum of ranks
    ("0.7*rsr + 0.3*lalp"), an import path ("package.module:Name") of an installed module or one in the working
    directory, or, in Python, an object."""
    threshold: float | None = None
    """Worst acceptable criterion value: a branch none of whose candidates reaches it is pruned (see on_unlearnable).
    None accepts every value."""
    on_unlearnable: Unlearnable = "stop"
    """What the search does when no candidate of a prompt's round is acceptable (worse than the threshold, a duplicate
    or a loop). stop prunes the branches; resample samples further candidates; shorten samples shorter and shorter ones;
    accept_best keeps the best candidate that only misses the threshold, and marks it as forced; ask_teacher lets the
    first of several teachers write alone, and the next one where none of its candidates is acceptable. Under the other
    values all teachers write in every round."""
    max_resamples: int = 2
    """Maximum number of times that on_unlearnable=resample samples the candidates of a round again, before the branches
    are pruned."""
    min_chunk_tokens: int = 16
    """Smallest value to which on_unlearnable=shorten halves chunk.tokens, before the branches are pruned. The next
    round has the whole chunk again."""
    drop_teacher_after: int | None = None
    """Number of rounds of a prompt in a row that one of several teachers loses, after which it is asked no more for the
    rest of the prompt. None asks all to the end."""
    selection_temperature: float = 0.0
    """Temperature of the choice among acceptable candidates, in the unit of the criterion: the kept ones are drawn
    without replacement from the softmax of the values over the temperature. 0 keeps the best ones."""
    prompt_budget: Budget = Budget()
    """Limits of one prompt. Where the next round could go beyond them, the prompt ends with what it has, of status
    budget. Seconds count from the prompt's first round, waiting included, and make the result depend on the machine."""
    total_budget: Budget = Budget()
    """Limits of all prompts together. When one is reached the search ends at once: prompts that are not finished end
    with what they have, of status budget."""
    max_tokens: int = 4096
    """Maximum number of tokens in the response."""
    teacher_topk: int = 0
    """How many of the teacher's most likely tokens are kept at every position of a trajectory, for distillation with
    `genssd train --kd-ratio`: 4 bytes each. While the search runs, the last hidden states of all live candidates are
    held as well."""
    sampling: Sampling = Sampling(top_p=0.95)
    """Temperature and filters with which the teacher samples."""
    stop: tuple[str, ...] = ()
    """Texts at each of which a response ends, such as "\\n\\nQuestion:". The names of special tokens are text here. A
    chunk does not end inside the beginning of one, so that it may have a token more than its rule says."""
    include_stop: bool = False
    """Whether a response keeps the text at which it ends, with the whole token that completes it; else the text before
    it is kept."""
    loop_guard: LoopGuard | bool | None = True
    """Whether candidates that end in a repetition are rejected. In Python, a `LoopGuard` sets other limits."""
    seed: int = 0
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        self.check_values()
        criterion = resolve(self.criterion)
        reason = not_in_search(criterion)
        if reason is not None:
            raise InputError(
                f"{criterion!r} cannot judge chunks: {reason}; use it on finished traces with `genssd score`"
            )

    def check_values(self) -> None:
        """Raise InputError on the first option that cannot be used; the criterion, which is not made here, apart."""
        object.__setattr__(self, "chunk", Chunk.of(self.chunk))
        check_types(self, infinite=("threshold",))  # with an infinite one, everything is accepted or nothing
        StopStrings(texts=self.stop)
        for name in ("candidates", "beam", "max_tokens"):
            check_count(name, getattr(self, name))
        check_count("teacher_topk", self.teacher_topk, least=0)
        check_count("max_resamples", self.max_resamples)
        check_count("min_chunk_tokens", self.min_chunk_tokens)
        if self.drop_teacher_after is not None:
            check_count("drop_teacher_after", self.drop_teacher_after)
        self._check_policies()

    def _check_policies(self) -> None:
        """Raise InputError on a temperature, a policy or a budget that cannot do what it is for."""
        if not self.selection_temperature == 0.0 and not self.selection_temperature >= 1e-30:
            raise InputError(f"selection_temperature must be 0 or at least 1e-30, not {self.selection_temperature}")
        if self.on_unlearnable == "resample" and self.sampling.temperature == 0.0:
            raise InputError(
                "on_unlearnable=resample draws the same candidates again at temperature 0; raise sampling.temperature"
            )
        if self.on_unlearnable == "ask_teacher" and self.drop_teacher_after is not None:
            raise InputError(
                "drop_teacher_after is for teachers that write in the same rounds; with on_unlearnable=ask_teacher the "
                "next one writes only where it is needed"
            )
        if self.on_unlearnable == "shorten" and self.chunk.least <= self.min_chunk_tokens:
            raise InputError(
                f"on_unlearnable=shorten has nothing to shorten: chunk tokens {self.chunk.least} must be above "
                f"min_chunk_tokens {self.min_chunk_tokens}"
            )
        most = self.candidates * self.longest_candidate
        if self.prompt_budget.tokens is not None and self.prompt_budget.tokens < most:
            raise InputError(
                f"prompt_budget tokens {self.prompt_budget.tokens} must be at least {most}, which the candidates of a "
                "first round may take"
            )

    @property
    def longest_candidate(self) -> int:
        """Maximum number of tokens in a candidate."""
        return min(self.chunk.longest + StopStrings(texts=self.stop).slack, self.max_tokens)

    def with_changes(self, **changes: Unpack[SearchChanges]) -> SearchOptions:
        """Return these options with some values replaced, as a plain SearchOptions also for a derived class.

        Raises InputError on an unknown name, which it quotes with the closest match, and on an unusable value.
        """
        names = [field.name for field in dataclasses.fields(SearchOptions)]
        for name in changes:
            if name not in names:
                raise InputError(f"unknown search option {name!r}{suggest_or_list(name, names)}")
        return SearchOptions(**{**{name: getattr(self, name) for name in names}, **changes})


class SearchChanges(TypedDict, total=False):
    """The fields of `SearchOptions` as keyword arguments, for type checkers and editors."""

    candidates: int
    chunk: Chunk | int
    beam: int
    criterion: str | AnyCriterion
    threshold: float | None
    on_unlearnable: Unlearnable
    max_resamples: int
    min_chunk_tokens: int
    drop_teacher_after: int | None
    selection_temperature: float
    prompt_budget: Budget
    total_budget: Budget
    max_tokens: int
    teacher_topk: int
    sampling: Sampling
    stop: tuple[str, ...]
    include_stop: bool
    loop_guard: LoopGuard | bool | None
    seed: int
