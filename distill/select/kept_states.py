"""The teacher's hidden states of what a command keeps: the teacher reads every response once more, as it is finished.

The pass takes pages that nothing reserves. A response for which they are not free waits until others have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from genssd.distill.data.state_store import DTYPES
from genssd.distill.runs.teacher_options import StateType
from genssd.engine.common.errors import CapacityError
from genssd.engine.engine import Engine

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptText:
    """A response as the teacher of a training reads it: the tokens of the lead are a part of it."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """The student's tokens of the lead, then those of the response."""

    @staticmethod
    def of(
        teacher_prompt: Sequence[int], student_prompt: Sequence[int], num_lead: int, ids: Sequence[int]
    ) -> KeptText | None:
        """Return the text of a response; None of an empty one. num_lead: see `PairPrompt`.

        The prompt is the one that a teacher in memory reads (`_train_lead` of example_files.py).
        """
        if not ids:
            return None
        prompt, lead = tuple(teacher_prompt), tuple(student_prompt[len(student_prompt) - num_lead :])
        if lead and prompt[-num_lead:] != lead:
            prompt = tuple(student_prompt)
        return KeptText(prompt_ids=prompt[: len(prompt) - num_lead], ids=(*lead, *ids))


def add_states(
    engine: Engine, dtype: StateType | None, outcomes: Iterable[tuple[int, R, KeptText | None]]
) -> Iterator[tuple[int, R, Tensor | str | None]]:
    """Yield every outcome with the teacher's states of its text, [tokens, width], on the CPU.

    None in their place where dtype or text are None; where the teacher cannot read the text, the reason.
    """
    if dtype is None:
        yield from ((place, outcome, None) for place, outcome, _ in outcomes)
        return
    waiting = deque[tuple[int, R, KeptText | None]]()
    for one in outcomes:
        waiting.append(one)
        while waiting:
            try:
                states = _read(engine, dtype, waiting[0][2])
            except CapacityError:
                break
            place, outcome, _ = waiting.popleft()
            yield place, outcome, states
    for place, outcome, text in waiting:  # nothing else runs any more
        try:
            yield place, outcome, _read(engine, dtype, text)
        except CapacityError as error:
            yield place, outcome, f"teacher_states: {error}"


def _read(engine: Engine, dtype: StateType, text: KeptText | None) -> Tensor | None:
    """Return the states of a text. Raises CapacityError where the cache has no room."""
    if text is None:
        return None
    return engine.hidden_states(text.prompt_ids, text.ids).to("cpu", DTYPES[dtype])
