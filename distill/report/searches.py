"""Runs of select and generate, prompt by prompt, as the page shows them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from markupsafe import Markup

from genssd.distill.report.boxes import (
    Box,
    describe_judgements,
    find_paths,
    make_boxes,
    make_written_boxes,
    round_value,
)
from genssd.distill.report.figures import SearchFigures
from genssd.distill.report.found import FoundRun
from genssd.distill.report.packing import pack
from genssd.distill.report.texts import TokenTexts, write_prompt
from genssd.distill.runs.journal import sound_rows
from genssd.distill.select.decisions import Activations, LocalLogprob, parse_decisions
from genssd.distill.select.judging import Judgement, judge_rounds
from genssd.distill.select.notes import list_responses
from genssd.engine.common.errors import GenssdError
from genssd.engine.common.quoting import one_line
from genssd.engine.criteria.criterion import AnyCriterion
from genssd.engine.criteria.criterion_calls import is_higher_better
from genssd.engine.criteria.criterion_names import resolve
from genssd.kernels.logprob import TokenStats

MAX_QUESTION = 4000
"""Maximum number of characters of a question in the list of prompts, in which the page searches."""
FORM_FAULTS = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError)
"""Errors of a line whose values are not those that this version of genssd writes."""

ScoreResponses = Callable[[Sequence[int], Sequence[Sequence[int]]], list[TokenStats]]
"""Function that returns the student's statistics of responses, from the token ids of the prompt and of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentReader:
    """The student in memory, for what a run does not store."""

    fingerprint: str
    tokenizer: str
    """Fingerprint of its tokenizer."""
    local_logprob: LocalLogprob
    activations: Activations
    score: ScoreResponses


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPrompt:
    """One prompt of a search."""

    entry: Mapping[str, Any]
    """Line in the page's list."""
    boxes: Sequence[Box]
    rounds: int
    judgements: Mapping[str, Sequence[Judgement]]
    """The rounds as every criterion decides them."""
    tree: Callable[[], Mapping[str, Any]]
    """Function that makes the data of the tree, which is not needed of all prompts."""


@dataclass(slots=True)
class Search:
    """One run of select or generate while it is read."""

    found: FoundRun
    criteria: dict[str, AnyCriterion]
    """Criteria by name, the run's own first; one that cannot judge the run is removed."""
    own: str | None
    """Name of the run's criterion; None where nobody chose."""
    student: StudentReader | None
    faults: list[str]
    """Takes what cannot be read, in sentences."""
    figures: SearchFigures = field(default_factory=SearchFigures)
    left_out: dict[str, str] = field(default_factory=dict)
    """Why criteria were removed, by name."""
    texts: TokenTexts | None = None
    teacher: str = ""
    teachers: list[str] = field(default_factory=list)
    """Names of the teachers, in their order."""

    @classmethod
    def of(cls, found: FoundRun, criteria: Sequence[str], student: StudentReader | None, faults: list[str]) -> Search:
        """Return the search of a run, of which nothing has been read yet."""
        own = str(found.config["criterion"]) if found.command == "select" else None
        names = [] if own is None else list(dict.fromkeys((own, *criteria)))
        search = cls(found=found, criteria={}, own=own, student=student, faults=faults)
        for name in names:
            try:
                search.criteria[name] = resolve(name)
            except GenssdError as error:  # a criterion of the run's own, whose file is gone
                search.left_out[name] = str(error)
        return search

    @property
    def journal(self) -> Path:
        """File with a line per prompt."""
        return self.found.path / ("selections.jsonl" if self.found.command == "select" else "responses.jsonl")

    def read(self, number: int, limit: int) -> Iterator[tuple[Mapping[str, Any], Markup] | None]:
        """Count the prompts of the journal, in order, and yield the lines of the list and the packed trees.

        number: of the search in the page. limit: maximum number of prompts with trees; None stands for the others.
        """
        rows = self._read_selections() if self.found.command == "select" else self._read_responses()
        shown = 0
        for line, read in rows:
            try:
                prompt = read()
                json.dumps(prompt.entry, allow_nan=False)
                piece = pack(f"tree-{number}-{shown}", prompt.tree()) if shown < limit else None
            except FORM_FAULTS as error:
                self.faults.append(
                    f"{self.journal}, line {line} is left out: it is not of the form that this version of genssd "
                    f"writes ({type(error).__name__}: {one_line(error)})"
                )
                continue
            self.figures.add(prompt.entry, prompt.boxes, prompt.rounds, prompt.judgements)
            shown += piece is not None
            yield None if piece is None else (prompt.entry, piece)

    def _read_selections(self) -> Iterator[tuple[int, Callable[[], ReadPrompt]]]:
        """Yield for every line of the journal its number and the function that reads the prompt with its decisions."""
        log = self.found.path / "decisions.jsonl"
        logged = sound_rows(log, self.faults)
        waiting: dict[str, Mapping[str, Any]] = {}
        for row, number in sound_rows(self.journal, self.faults):
            index = repr(row.get("index"))
            while index not in waiting:
                decision = next(logged, None)
                if decision is None:
                    break
                waiting[repr(decision[0].get("index"))] = decision[0]
            decided = waiting.pop(index, None)
            if decided is None:
                self.faults.append(f"{self.journal}, line {number} is left out: {log.name} has no decisions of it")
                continue
            yield number, partial(self._show_selection, row, decided)

    def _read_responses(self) -> Iterator[tuple[int, Callable[[], ReadPrompt]]]:
        for row, number in sound_rows(self.journal, self.faults):
            yield number, partial(self._show_responses, row)

    def _show_selection(self, row: Mapping[str, Any], decided: Mapping[str, Any]) -> ReadPrompt:
        texts = self._open_texts(row)
        student = self.student if self._has_student(row) else None
        decisions = parse_decisions(
            row,
            decided,
            texts.tokenizer,
            None if student is None else student.local_logprob,
            None if student is None else student.activations,
        )
        boxes = make_boxes(decisions)
        paths = find_paths(row, boxes)
        judgements = self._judge(decisions)
        entry = self._describe(row, boxes, judgements)

        def make_tree() -> dict[str, Any]:
            records = [logged.record for logged in decisions.rounds]
            return {
                "rounds": [[r.round, r.attempt, r.chunk_tokens, r.decision] for r in records],
                "boxes": [box.as_json(texts) for box in boxes],
                "criteria": {name: describe_judgements(of, boxes) for name, of in judgements.items()},
                "responses": _describe_responses(row, paths),
            }

        return ReadPrompt(entry=entry, boxes=boxes, rounds=len(decisions.rounds), judgements=judgements, tree=make_tree)

    def _show_responses(self, row: Mapping[str, Any]) -> ReadPrompt:
        texts = self._open_texts(row)
        students = None
        if self.student is not None and row["tokenizer"] == self.student.tokenizer:
            students = self.student.score(
                row["student_prompt_ids"], [response["completion_ids"] for response in list_responses(row)]
            )
        boxes = make_written_boxes(row, students)
        entry = self._describe(row, boxes, {})

        def make_tree() -> dict[str, Any]:
            return {
                "rounds": [[0, 0, None, "written"]],
                "boxes": [box.as_json(texts) for box in boxes],
                "criteria": {},
                "responses": _describe_responses(row, [[i] for i in range(len(boxes))]),
            }

        return ReadPrompt(entry=entry, boxes=boxes, rounds=1, judgements={}, tree=make_tree)

    def _open_texts(self, row: Mapping[str, Any]) -> TokenTexts:
        """Return the texts of the run's tokens; the tokenizer is found by the first row."""
        if self.texts is None:
            config = self.found.config
            roles = ("student", "teacher", "teacher_tokenizer")
            names = [str(config[role]) for role in roles if config.get(role) is not None]
            opened = [TokenTexts.open(name, row["tokenizer"]) for name in names] or [TokenTexts.open(None, None)]
            self.texts = next((texts for texts in opened if texts.tokenizer is not None), opened[0])
            self.teacher = str(row["teacher"]["name"])
            self.teachers = [str(one["name"]) for one in row.get("teachers", [row["teacher"]])]
        return self.texts

    def _has_student(self, row: Mapping[str, Any]) -> bool:
        return self.student is not None and row["student"]["fingerprint"] == self.student.fingerprint

    def _judge(self, decisions: Any) -> dict[str, list[Judgement]]:
        """Return the rounds as every criterion decides them; one that cannot judge them is removed."""
        judgements: dict[str, list[Judgement]] = {}
        shortest = int(self.found.config["chunk"]["shortest"])
        for name, criterion in list(self.criteria.items()):
            try:
                judgements[name] = list(judge_rounds(decisions, criterion, shortest=shortest, is_own=name == self.own))
            except GenssdError as error:
                self.left_out[name] = str(error)
                del self.criteria[name]
                self.figures.criteria.pop(name, None)
        return judgements

    def _describe(
        self, row: Mapping[str, Any], boxes: Sequence[Box], judgements: Mapping[str, Sequence[Judgement]]
    ) -> dict[str, Any]:
        """Return the prompt's line in the page's list."""
        key = json.dumps([row["prompt"], row.get("occurrence", 0)], sort_keys=True)
        return {
            "key": blake2b(key.encode(), digest_size=8).hexdigest(),
            "index": int(row["index"]),
            "line": int(row["source"]["line"]),
            "question": write_prompt(row["prompt"])[:MAX_QUESTION],
            "answer": None if row["answer"] is None else str(row["answer"]),
            **_describe_verdict(row),
            "score": round_value(row.get("score")),
            "tokens": len(row["completion_ids"]),
            "sampled": sum(box.sampled for box in boxes),
            "teacher": str(row["teacher"]["name"]),
            "rounds": sum(row["rounds"].values()) if "rounds" in row else 1,
            "differing": {name: sum(not j.agrees for j in of) for name, of in judgements.items()},
        }

    def as_json(self) -> dict[str, Any]:
        """Return what the page says of the run as a whole."""
        config = self.found.config
        return {
            "name": self.found.name,
            "command": self.found.command,
            "is_finished": self.found.is_finished,
            "teacher": self.teacher or str(config.get("teacher")),
            "teachers": self.teachers,
            "student": config.get("student"),
            "criterion": self.own,
            "threshold": config.get("threshold"),
            "candidates": config.get("candidates", config.get("n")),
            "text_fault": None if self.texts is None else self.texts.fault,
            "higher_is_better": {name: is_higher_better(criterion) for name, criterion in self.criteria.items()},
            "left_out": self.left_out,
            "has_student": self.found.command == "select" or self.student is not None,
            "figures": self.figures.as_json(),
        }


def _describe_verdict(response: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a response ended and whether it is correct. Raises ValueError on values that no run writes."""
    if not (response["correct"] is None or isinstance(response["correct"], bool)):
        raise ValueError("correct is no verdict")
    undecided = response["undecided"]
    return {
        "status": str(response["status"]),
        "correct": response["correct"],
        "undecided": None if undecided is None else str(undecided),
    }


def _describe_responses(row: Mapping[str, Any], paths: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    return [
        {
            "path": list(path),
            **_describe_verdict(response),
            "cut_by": None if response["cut_by"] is None else str(response["cut_by"]),
            "score": round_value(response.get("score")),
            "tokens": len(response["completion_ids"]),
        }
        for response, path in zip(list_responses(row), paths, strict=True)
    ]
