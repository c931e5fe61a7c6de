"""The candidates of one prompt as the page shows them: boxes of a tree, and the paths that are responses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genssd.distill.report.packing import HUNDREDTHS, round_numbers
from genssd.distill.report.texts import TokenTexts
from genssd.distill.select.decisions import Decisions, LoggedCandidate
from genssd.distill.select.judging import Judgement, Trace
from genssd.distill.select.notes import list_responses
from genssd.kernels.logprob import TokenStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One candidate; of a run without selection, one response."""

    trace: Trace
    attempt: int
    verdict: str
    """Verdict of the search; "written" where nobody chose."""
    score: float | None
    draw: float | None
    """Probability in the first draw of its round, where the run drew what it kept."""
    ending: str
    """Why the candidate ended: "chunk", "finished", "stopped" or "length"."""
    token_ids: tuple[int, ...]
    before_ids: tuple[int, ...]
    """Token ids of the response before it."""
    student: TokenStats | None
    """The student's statistics of its tokens; None where they are not stored."""
    teacher: Sequence[float] | None
    """The teacher's log-probabilities of its tokens; None where they are not stored, or of other tokens."""
    sampled: int
    """Number of tokens that the writer sampled for it."""
    writer: int = 0
    """Index of the teacher that wrote it; 0 where there is one."""
    is_provisional: bool = False
    """Whether its tokens are also those of the box after it, as the student held them back."""

    @classmethod
    def of_candidate(cls, logged: LoggedCandidate, attempt: int) -> Box:
        """Return the box of a candidate of a decision log."""
        candidate, teacher = logged.candidate, logged.candidate.teacher_logprob
        return cls(
            trace=logged.trace,
            attempt=attempt,
            verdict=logged.verdict,
            score=round_value(logged.score, digits=9),
            draw=logged.probability,
            ending=logged.ended,
            token_ids=candidate.token_ids,
            before_ids=candidate.history_ids,
            student=candidate.stats,
            teacher=None if teacher is None or candidate.spans is not None else teacher.tolist(),
            sampled=len(candidate.token_ids if teacher is None else teacher),
            writer=logged.teacher,
            is_provisional=logged.is_provisional,
        )

    def __post_init__(self) -> None:
        counts = [] if self.student is None else [len(self.student.logprob), len(self.student.entropy)]
        counts += [] if self.student is None else [len(self.student.rank)]
        counts += [] if self.teacher is None else [len(self.teacher)]
        if any(count != len(self.token_ids) for count in counts):
            raise ValueError("a candidate has not as many statistics as tokens")

    @property
    def is_kept(self) -> bool:
        """Whether the box is part of a response."""
        return self.verdict in ("kept", "forced", "written")

    def as_json(self, texts: TokenTexts) -> dict[str, Any]:
        """Return the box as the page's script reads it; lengths are counted in UTF-16 units, as JavaScript does."""
        pieces = texts.decode(self.token_ids, self.before_ids)
        student = self.student
        return {
            "trace": list(self.trace),
            "attempt": self.attempt,
            "verdict": self.verdict,
            "score": self.score,
            "draw": self.draw,
            "ending": self.ending,
            "writer": self.writer,
            "provisional": self.is_provisional,
            "text": "".join(pieces),
            "lengths": [_count_units(piece) for piece in pieces],
            "student": None if student is None else round_numbers(student.logprob, -HUNDREDTHS),
            "entropy": None if student is None else round_numbers(student.entropy),
            "rank": None if student is None else student.rank.tolist(),
            "teacher": None if self.teacher is None else round_numbers(self.teacher, -HUNDREDTHS),
        }


def _count_units(text: str) -> int:
    """Return the length of a text in UTF-16 units."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2


def make_boxes(decisions: Decisions) -> list[Box]:
    """Return the boxes of one prompt, round by round."""
    return [Box.of_candidate(c, logged.record.attempt) for logged in decisions.rounds for c in logged.candidates]


def make_written_boxes(row: Mapping[str, Any], students: Sequence[TokenStats] | None) -> list[Box]:
    """Return the boxes of a line of responses.jsonl: its responses beside each other."""
    return [
        Box(
            trace=(i,),
            attempt=0,
            verdict="written",
            score=None,
            draw=None,
            ending=response["status"] if response.get("stop_reason") is None else "stopped",
            token_ids=tuple(response["completion_ids"]),
            before_ids=(),
            student=None if students is None else students[i],
            teacher=response["teacher_logprobs"],
            sampled=len(response["completion_ids"]),
        )
        for i, response in enumerate(list_responses(row))
    ]


def find_paths(row: Mapping[str, Any], boxes: Sequence[Box]) -> list[list[int]]:
    """Return the places of the boxes that each response of a row is made of; empty for a response without tokens.

    A response that ended where the student held text back has tokens after those of its boxes.
    """
    place = {box.trace: i for i, box in enumerate(boxes)}
    with_kept_child = {box.trace[:-1] for box in boxes if box.is_kept}
    paths: dict[tuple[int, ...], list[list[int]]] = {}
    for box in boxes:
        if box.is_kept and box.trace not in with_kept_child:
            chain = [place[box.trace[:depth]] for depth in range(1, len(box.trace) + 1)]
            paths.setdefault((*box.before_ids, *box.token_ids), []).append(chain)
    found = []
    for response in list_responses(row):
        ids = tuple(response["completion_ids"])
        begun = (read for read, left in paths.items() if left and ids[: len(read)] == read)
        longest = max(begun, key=len, default=None)
        found.append([] if longest is None else paths[longest].pop(0))
    return found


def describe_judgements(judgements: Sequence[Judgement], boxes: Sequence[Box]) -> dict[str, Any]:
    """Return how another criterion decides the rounds, as the page's script reads it.

    values: of every box. picked: places of the boxes that it prefers. exact: places of the first box of every round
    that a search by it would have had.
    """
    place = {box.trace: i for i, box in enumerate(boxes)}
    values: list[float | None] = [None] * len(boxes)
    for judgement in judgements:
        for decided, value in zip(judgement.judged.decided, judgement.values, strict=True):
            values[place[decided.trace]] = round_value(value)
    return {
        "values": values,
        "picked": [place[trace] for judgement in judgements for trace in judgement.preferred],
        "exact": [judgement.judged.is_exact for judgement in judgements],
        "differs": [not judgement.agrees for judgement in judgements],
    }


def round_value(value: float | None, digits: int = 5) -> float | None:
    """Return a score with some significant digits; None where it is missing or not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")
