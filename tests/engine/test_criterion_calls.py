"""What a user's criterion raises or returns wrongly is one line that names it; finished prompts are kept."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_pair import TinyPair

from genssd.cli import main
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.criteria.candidate import Candidate
from genssd.engine.criteria.criterion_calls import (
    call_features,
    call_ratio,
    call_score,
    call_score_pool,
    evaluate,
    evaluate_distinct,
    is_higher_better,
)
from genssd.engine.criteria.likelihood import Perplexity
from genssd.engine.readers.reading import ByteSpans
from genssd.kernels.logprob import TokenStats

OWN = """
import torch

class Own:
    def score(self, candidate):
        if candidate.answer == "13":
            return torch.zeros(2) @ torch.zeros(3)
        return float(len(candidate.token_ids))

    def higher_is_better(self):
        return False
"""

CANDIDATE = Candidate(token_ids=(1,), stats=TokenStats.empty(), final=True, finished=False)


class Given:
    """A criterion that returns what it is given, or raises it."""

    def __init__(self, value: Any, higher: Any = False, num_features: Any = 1) -> None:
        self.value, self.higher, self.num_features = value, higher, num_features
        self.pool = "prompt"

    def give(self, *arguments: Any) -> Any:
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value

    def higher_is_better(self) -> Any:
        if isinstance(self.higher, BaseException):
            raise self.higher
        return self.higher

    ratio = give


class GivenScore(Given):
    score = Given.give


class GivenPool(Given):
    features = score_pool = Given.give


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2, 2.0), (np.float32(0.5), 0.5), (torch.tensor([1.5]), 1.5), (math.inf, math.inf), (-(10**400), -math.inf)],
)
def test_numbers_are_taken_as_they_are(value: Any, expected: float) -> None:
    assert call_score(GivenScore(value), CANDIDATE) == expected
    assert call_score_pool(GivenPool([value]), [(1.0,)]) == [expected]


@pytest.mark.parametrize(
    ("value", "shown"),
    [("1.5", "'1.5'"), (None, "None"), (True, "True"), (1j, "1j"), (torch.zeros(3), r"a Tensor of the shape \[3\]")],
)
def test_what_is_no_number_is_named(value: Any, shown: str) -> None:
    message = rf"the criterion \S*test_criterion_calls:GivenScore must return a number from score\(\), not {shown}$"
    with pytest.raises(InputError, match=message):
        evaluate(GivenScore(value), [CANDIDATE])
    with pytest.raises(InputError, match=rf"from features\(\), not {shown}$"):
        call_features(GivenPool([value]), CANDIDATE)


def test_pools_give_a_number_for_each() -> None:
    for values in ([1.0], 2.0, "ab", None):
        with pytest.raises(InputError, match=r"GivenPool must return a list of 2 numbers from score_pool\(\), not"):
            call_score_pool(GivenPool(values), [(1.0,), (2.0,)])
        with pytest.raises(InputError, match=r"GivenPool must return a list of 2 numbers from features\(\), not"):
            call_features(GivenPool(values, num_features=2), CANDIDATE)
        with pytest.raises(InputError, match=r"must return a list of 2 numbers from ratio\(\), not"):
            call_ratio(Given(values), CANDIDATE)
    assert call_ratio(Given(np.array([1, 2])), CANDIDATE) == (1.0, 2.0)


class TeacherSum:
    """A pool criterion whose value is the teacher's log-probability of the text so far, over the pool's mean."""

    pool, num_features = "prompt", 1

    def features(self, candidate: Candidate) -> tuple[float, ...]:
        assert candidate.teacher_logprob is not None
        assert candidate.history_teacher_logprob is not None
        return (float(candidate.teacher_logprob.sum() + candidate.history_teacher_logprob.sum()),)

    def score_pool(self, features: Sequence[tuple[float, ...]]) -> list[float]:
        mean = sum(value for (value,) in features) / len(features)
        return [value - mean for (value,) in features]

    def higher_is_better(self) -> bool:
        return True


def test_in_a_pool_equal_candidates_count_once_and_others_of_the_same_tokens_do_not() -> None:
    """A student that reads by bytes has the same tokens of texts that the teacher wrote in other tokens."""

    def make(teacher: list[float], history: list[float], student_bytes: tuple[int, ...] = (1, 2)) -> Candidate:
        return dataclasses.replace(
            CANDIDATE,
            teacher_logprob=torch.tensor(teacher),
            history_teacher_logprob=torch.tensor(history),
            spans=ByteSpans(student=student_bytes, teacher=(1,) * len(teacher)),
        )

    first, longer, other_history, other_spans = (
        make([-1.0], [-2.0]), make([-1.0, -1.0], [-2.0]), make([-1.0], [-5.0]), make([-1.0], [-2.0], (2, 1)),
    )  # fmt: skip
    pool = [first, longer, make([-1.0], [-2.0]), other_history, other_spans]
    values = evaluate_distinct(TeacherSum(), pool)
    sums = [-3.0, -4.0, -3.0, -6.0, -3.0]
    mean = (-3.0 - 4.0 - 6.0 - 3.0) / 4
    assert values == pytest.approx([total - mean for total in sums])


def test_exceptions_are_the_causes_of_a_line_with_their_place() -> None:
    fault = ZeroDivisionError("by\nzero")
    for call, method in (
        (lambda: call_score(GivenScore(fault), CANDIDATE), "score"),
        (lambda: call_features(GivenPool(fault), CANDIDATE), "features"),
        (lambda: call_score_pool(GivenPool(fault), [(1.0,)]), "score_pool"),
        (lambda: call_ratio(Given(fault), CANDIDATE), "ratio"),
        (lambda: is_higher_better(GivenScore(1.0, fault)), "higher_is_better"),
    ):
        with pytest.raises(
            InputError, match=rf" failed in {method}\(\): {re.escape(__file__)}, line \d+: Zero"
        ) as error:
            call()
        assert error.value.__cause__ is fault
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"must return True or False from higher_is_better\(\), not 'yes'"):
        is_higher_better(GivenScore(1.0, "yes"))


def test_errors_of_genssd_and_of_its_own_criteria_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CapacityError, match=r"^no room$"):
        call_score(GivenScore(CapacityError("no room")), CANDIDATE)
    with pytest.raises(MemoryError):
        call_score(GivenScore(MemoryError()), CANDIDATE)
    monkeypatch.setattr(Perplexity, "score", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call_score(Perplexity(), CANDIDATE)


@pytest.fixture
def own_criterion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A criterion in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_failing.py").write_text(OWN)
    yield tmp_path / "own_failing.py"
    sys.modules.pop("own_failing", None)


def test_select_ends_in_one_line_and_keeps_the_finished_prompts(
    tiny_pair: TinyPair, write_rows: Callable[..., Path], own_criterion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows([{"question": "1+1?", "answer": "2"}, {"question": "6+7?", "answer": "13"}])
    words = [
        "select", "--teacher", str(tiny_pair.teacher), "--student", str(tiny_pair.student), "--data", str(data),
        "--output-dir", "out", "--criterion", "own_failing:Own", "--candidates", "2", "--max-num-seqs", "2",
        "--max-tokens", "4", "--memory-bytes", str(1 << 22),
    ]  # fmt: skip
    for resume in ([], ["--resume"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, *resume])
        assert stop.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        place = re.escape(str(own_criterion))
        assert re.search(rf"the criterion own_failing:Own failed in score\(\): {place}, line 7: RuntimeError: ", last)
        (row,) = [json.loads(line) for line in Path("out/selections.jsonl").read_text().splitlines()]
        assert row["answer"] == "2"
    own_criterion.write_text(OWN.replace('"13"', '"x"'))
    del sys.modules["own_failing"]
    main([*words, "--resume"])
    assert len(Path("out/selections.jsonl").read_text().splitlines()) == 2


def test_score_names_the_criterion_as_well(
    tiny_pair: TinyPair, write_rows: Callable[..., Path], own_criterion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows([{"prompt": "6+7=", "completion": "13", "answer": "13"}])
    with pytest.raises(SystemExit):
        main(["score", "--student", str(tiny_pair.student), "--data", str(data), "--output-dir", "out",
              "--criteria", "own_failing:Own", "--memory-bytes", str(1 << 22)])  # fmt: skip
    assert "own_failing:Own failed in score(): " in capsys.readouterr().err
