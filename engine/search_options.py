"""The options of the search, as one value and as the keywords of `Engine.select_expand`."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import TypedDict, Unpack

from genssd.engine.candidate import AnyCriterion, PoolCriterion
from genssd.engine.chunk import Chunk
from genssd.engine.criterion_names import resolve
from genssd.engine.errors import InputError
from genssd.engine.loops import LoopGuard
from genssd.engine.options_check import check_count, check_types
from genssd.engine.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Options of the search in which the teacher writes candidates and the student chooses among them."""

    candidates: int = 4
    """Number of continuations sampled per live branch and round."""
    chunk: Chunk = Chunk()
    """Rule by which a candidate ends. In Python, a number stands for Chunk(tokens=number)."""
    beam: int = 1
    """Number of branches kept per prompt after each round."""
    criterion: str | AnyCriterion = "ppl"
    """Selection criterion: a registered name ("rsr"), one with options ("ppl(norm='byte')"), a weighted sum of ranks
    ("0.7*rsr + 0.3*lalp"), an import path ("package.module:Name") of an installed module or one in the working
    directory, or, in Python, an object."""
    threshold: float | None = None
    """Worst acceptable criterion value: a branch none of whose candidates reaches it is pruned. None never prunes."""
    max_tokens: int = 4096
    """Maximum number of tokens in the response."""
    teacher_topk: int = 0
    """How many of the teacher's most likely tokens are kept at every position of a trajectory, for distillation with
    `genssd train --kd-ratio`: 8 bytes each. While the search runs, the last hidden states of all live candidates are
    held as well."""
    sampling: Sampling = Sampling(top_p=0.95)
    """Temperature and filters with which the teacher samples."""
    loop_guard: LoopGuard | bool | None = True
    """Whether candidates that end in a repetition are rejected. In Python, a `LoopGuard` sets other limits."""
    seed: int = 0
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk", Chunk.of(self.chunk))
        check_types(self, infinite=("threshold",))  # with an infinite one, everything is accepted or nothing
        for name in ("candidates", "beam", "max_tokens"):
            check_count(name, getattr(self, name))
        check_count("teacher_topk", self.teacher_topk, least=0)
        criterion = resolve(self.criterion)
        if isinstance(criterion, PoolCriterion) and criterion.pool == "data":
            raise InputError(
                f"{criterion!r} is fitted over all of the data, which the search does not have yet; fix what it "
                "fits (aslec_casl(gamma=...)), or use it on finished traces with `genssd score`"
            )

    def with_changes(self, **changes: Unpack[SearchChanges]) -> SearchOptions:
        """Return these options with some values replaced, as a plain SearchOptions also for a derived class.

        Raises InputError on an unknown name, which it quotes with the closest match, and on an unusable value.
        """
        names = [field.name for field in dataclasses.fields(SearchOptions)]
        for name in changes:
            if name not in names:
                closest = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {closest[0]!r}?" if closest else f"; known: {', '.join(names)}"
                raise InputError(f"unknown search option {name!r}{hint}")
        return SearchOptions(**{**{name: getattr(self, name) for name in names}, **changes})


class SearchChanges(TypedDict, total=False):
    """The fields of `SearchOptions` as keyword arguments, for type checkers and editors."""

    candidates: int
    chunk: Chunk | int
    beam: int
    criterion: str | AnyCriterion
    threshold: float | None
    max_tokens: int
    teacher_topk: int
    sampling: Sampling
    loop_guard: LoopGuard | bool | None
    seed: int
