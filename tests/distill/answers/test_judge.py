"""Judgement of responses: the table of forms, whole data sets, thoughts, and the time limit."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.shared_data import SHARED_DATA

from genssd.distill.answers import formulas
from genssd.distill.answers.judge import AnswerJudge, judge
from genssd.distill.answers.thoughts import find_all_tags, find_open_tags
from genssd.distill.data.problems import parse_answer, read_problems
from genssd.engine.texts.thoughts import ThoughtTags

FORMS = [
    tuple(part.replace("⏎", "\n") for part in line.split("\t"))
    for line in Path(__file__).with_name("forms.tsv").read_text().splitlines()
    if not line.startswith("#")
]


def test_the_table_has_enough_forms_of_every_verdict() -> None:
    assert len(set(FORMS)) == len(FORMS) >= 200
    assert {verdict for verdict, _, _ in FORMS} == {"correct", "wrong", "undecidable"}


@pytest.mark.parametrize(("verdict", "reference", "response"), FORMS)
def test_forms_of_answers(verdict: str, reference: str, response: str) -> None:
    assert judge(response, reference).outcome == verdict


def test_a_problem_without_an_answer_is_undecidable() -> None:
    verdict = judge("\\boxed{7}", None)
    assert (verdict.outcome, verdict.is_correct) == ("undecidable", False)
    assert verdict.undecided == "there is no reference answer"


def test_a_thought_that_the_prompt_opened_must_be_closed() -> None:
    assert find_open_tags("<|assistant|><think>\n")
    assert find_open_tags("what does <think> mean? </think>") is None
    assert not judge("it is \\boxed{5}", "5", thought_is_open=True).is_correct
    assert judge("3 or 4?</think>\\boxed{5}", "5", thought_is_open=True).is_correct


def test_tags_of_a_template_are_found() -> None:
    tags = find_all_tags("{{ '<my_thoughts>' }} {%- if '</my_thoughts>' in content %} </tool_call> </think>")
    assert ThoughtTags("<my_thoughts>", "</my_thoughts>") in tags
    assert not any("tool" in pair.opening for pair in tags)
    assert len(set(tags)) == len(tags)
    assert judge("<my_thoughts>\\boxed{3}</my_thoughts>\\boxed{5}", "5", tags=tags).is_correct
    assert not judge("<my_thoughts>\\boxed{5}", "5", tags=tags).is_correct


class SpelledTokens:
    """A tokenizer whose tokens are the given texts, and whose tokens in angle brackets with bars are special."""

    def __init__(self, *texts: str, template: str) -> None:
        self.hf = self
        self.chat_template = template
        self.texts = texts
        self.all_special_tokens = [text for text in texts if text.startswith("<|")]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(self.texts[i] for i in ids if not (skip_special_tokens and self.texts[i].startswith("<|")))


def test_special_tokens_that_enclose_thoughts_are_read() -> None:
    tokenizer: Any = SpelledTokens(
        "<|START_THINKING|>", "<|END_THINKING|>", "\\boxed{3}", "\\boxed{5}", "<|end|>", template=""
    )
    by_ids = AnswerJudge(tokenizer)
    assert by_ids.judge([4], [0, 2, 1, 3, 4], "5").is_correct
    assert not by_ids.judge([4], [0, 3, 4], "5").is_correct
    assert not by_ids.judge([4, 0], [3, 4], "5").is_correct
    assert by_ids.judge([4, 0], [2, 1, 3], "5").is_correct
    assert by_ids.for_prompt([4])("\\boxed{5}", "5").is_correct


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-05, "0.00001"), (43.0, "43"), (0.1, "0.1"), (-2.5e-7, "-0.00000025"), (1e22, "1" + "0" * 22), (7, "7")],
)
def test_numbers_of_json_keep_their_value(value: float, text: str) -> None:
    assert parse_answer({"answer": value}, "here") == text
    assert judge(f"\\boxed{{{text}}}", text).is_correct


def test_only_a_closing_line_is_read_as_the_answer_of_a_row() -> None:
    assert parse_answer({"solution": "3\n#### 72\n"}, "here") == "72"
    worked = "#### Step 1\n3 + 4 = 7\nThe answer is 7."
    assert parse_answer({"solution": worked}, "here") == worked


HARD = ("\\binom{10^9}{10^8}", "5 + x")
"""A formula that math-verify does not finish, and a reference."""


def test_the_time_limit_holds_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "TIME_LIMIT", 1.0)
    formulas.compare_formulas.cache_clear()
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(judge(f"\\boxed{{{HARD[0]}}}", HARD[1])))
    start = time.monotonic()
    thread.start()
    thread.join(120)
    assert not thread.is_alive()
    assert verdicts[0].outcome == "undecidable"
    assert "takes longer than" in verdicts[0].reason
    assert time.monotonic() - start >= 1
    assert judge("\\boxed{\\sqrt{18}}", "3\\sqrt{2}").is_correct, "a new process judges the next pair"


def test_threads_judge_the_same_as_the_main_thread() -> None:
    verdicts: dict[int, bool] = {}

    def run(k: int) -> None:
        verdicts[k] = judge(f"\\boxed{{\\sqrt{{{2 * k * k}}}}}", f"{k}\\sqrt{{2}}").is_correct

    threads = [threading.Thread(target=run, args=(k,)) for k in range(3, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(3, 11), True)


@pytest.mark.parametrize(
    "text",
    [
        "$",
        "\\boxed{",
        "\\boxed{1} and ",
        "the answer is ",
        "1,111",
        "(",
        "#### ",
        "answer\n",
        "\\(",
        "\\[1",
        "\n",
        "a. ",
    ],
)
def test_work_grows_with_the_length_of_a_response_and_not_with_its_square(text: str) -> None:
    def work(pieces: int) -> float:  # in seconds of this thread's processor, which other processes do not take
        start = time.thread_time()
        judge(text * pieces, "5")
        judge(text * pieces, "Paris")
        return time.thread_time() - start

    # four times the text is four times the work, and 16 times if work is quadratic; 20 ms are lost among other things
    assert any(work(8_000) < 10 * max(work(2_000), 0.02) for _ in range(3))


def test_random_texts_are_judged_without_an_error() -> None:
    pieces = re.findall(
        r"\S+",
        r"\boxed{ } { ( ) [ ] $ \( \) 5 12 1,234 3.14 - + * / = ^ _ \frac \sqrt \text{ \pm \cup \in x ab A (B) or "
        r"\circ \begin{pmatrix} \\ & <think> </think> e10 1e9 \left \{ \infty 5:3 _8 cm % , . #### the|answer|is|",
    )
    draws = random.Random(5)
    for _ in range(1000):
        answer, response = ("".join(draws.choices(pieces, k=draws.randint(1, k))).replace("|", " ") for k in (6, 20))
        for text in (response, f"\\boxed{{{response}}}", f"The answer is {answer}"):
            verdict = judge(text, answer)
            assert (verdict.reason is None) == (verdict.outcome != "undecidable")


def read_shared(name: str) -> list[dict[str, str]]:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_reference_of_math_500_equals_itself_and_nothing_else() -> None:
    failures, accepted = [], []
    for row in read_shared("math500/test.jsonl"):
        answer = row["answer"]
        forms = (f"\\boxed{{{answer}}}", f"The answer is $\\boxed{{{answer}}}$.", row["solution"])
        failures += [(form, answer) for form in forms if not judge(form, answer).is_correct]
        if not judge(f"\\boxed{{{answer}}}", row["solution"]).is_correct:
            failures.append((answer, row["solution"]))
        for number in re.finditer(r"\d+", answer):
            before, after = answer[: number.start()], answer[number.end() :]
            others = {f"{before}{int(number[0]) + 1}{after}", f"{before}{number[0]}7{after}"}
            # a number by itself may be right where the rest is a unit, a base or the name of a variable
            rest = re.sub(r"\\(?:text|mbox|circ)|\\?\$|\^2|[,_x={}\\!]|_\{?\d", "", before + after)
            others |= {number[0]} if re.search(r"\d|\\|sqrt|pi|frac", rest) else set()
            accepted += [(o, answer) for o in others - {answer} if judge(f"\\boxed{{{o}}}", answer).is_correct]
    assert failures == []
    assert [pair for pair in accepted if not re.search(r"_", pair[1])] == []


def test_truncated_references_of_math_500_are_not_accepted() -> None:
    for row in read_shared("math500/test.jsonl"):
        answer = row["answer"]
        if re.search(r"circ|_|=|text|mbox", answer):
            continue  # without its unit, base or variable it is the same number
        for cut in {answer[: len(answer) // 2], answer[: -1 - answer.endswith("0")]}:
            assert not cut or not judge(f"\\boxed{{{cut}}}", answer).is_correct, (cut, answer)


@pytest.mark.parametrize("name", ["train", "test"])
def test_every_solution_of_gsm8k_gives_its_answer(name: str) -> None:
    rows = read_shared(f"gsm8k/{name}.jsonl")
    answers = [problem.answer for problem in read_problems(SHARED_DATA / f"gsm8k/{name}.jsonl")]
    wrong, accepted = [], []
    for row, answer in zip(rows, answers, strict=True):
        assert answer == row["answer"].rsplit("####", 1)[-1].strip()
        solution = re.sub(r"<<.*?>>", "", row["answer"])
        wrong += [text for text in (row["answer"], solution) if not judge(text, answer).is_correct]
        accepted += [answer] if judge(solution, str(int(answer.replace(",", "")) + 1)).outcome != "wrong" else []
    assert (wrong, accepted) == ([], [])


@pytest.mark.parametrize("name", ["addsub", "multiarith", "singleeq"])
def test_answers_of_mawps_are_numbers_that_equal_themselves(name: str) -> None:
    rows = read_shared(f"mawps/{name}.jsonl")
    for row, problem in zip(rows, read_problems(SHARED_DATA / f"mawps/{name}.jsonl"), strict=True):
        assert judge(f"It is {row['target']}.", problem.answer).is_correct
        assert not judge(f"It is {float(row['target']) + 1}.", problem.answer).is_correct
