"""Tables, verdict and page of invented nodes, for which the results are known."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from genssd.distill.diagnose.alignment import LossName
from genssd.distill.diagnose.diagnosis import Diagnosis
from genssd.distill.diagnose.page import render_page
from genssd.distill.diagnose.rows import make_node_rows
from genssd.distill.diagnose.tables import build_diagnosis
from genssd.distill.diagnose.verdict import write_verdict

LOSSES: tuple[LossName, ...] = ("forward_kl", "reverse_kl")
TEACHERS = ("good", "bad")
Q = math.log


def question(index: int, *, correct: bool, nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a line of questions.jsonl with one rollout of four tokens."""
    return {
        "index": index,
        "prompt": f"question <{index}>",
        "answer": "7",
        "source": {"file": "d.jsonl", "line": index + 1},
        "rollouts": [
            {"token_ids": [5, 6, 7, 8], "pieces": ["<b>", "x\n", "y", ""], "status": "length", "correct": correct}
        ],
        "planned_nodes": len(nodes) + 1,
        "nodes": list(nodes),
        "spent": {
            "completions": 8, "truncated": 2, "sampled_tokens": 100, "forced_tokens": 2, "prefix_tokens": 10,
            "naive_prefix_tokens": 30,
        },
    }  # fmt: skip


def node(position: int, successes: Sequence[Sequence[int]], *, tilt: float = 1.0) -> dict[str, Any]:
    """Return a node with two equally likely tokens; the good teacher prefers the first, the bad one the second."""
    good, bad = [Q(0.5) + tilt, Q(0.5) - tilt], [Q(0.5) - tilt, Q(0.5) + tilt]
    return {
        "rollout": 0,
        "position": position,
        "sampled": 0,
        "candidates": [5, 9],
        "texts": ["<b>", "z"],
        "logprob": {"itself": [Q(0.5), Q(0.5)], "good": good, "bad": bad},
        "completions": 4,
        "successes": [list(half) for half in successes],
        "truncated": [0, 1],
    }


FIRST, SECOND, NONE = ([2, 0], [2, 0]), ([0, 2], [0, 2]), ([0, 0], [0, 0])
FORCED = {
    **node(2, ([], [])), "candidates": [7], "texts": ["y"], "logprob": {name: [0.0] for name in ("itself", *TEACHERS)},
    "truncated": [],
}  # fmt: skip


def make_rows(count: int) -> list[dict[str, Any]]:
    """Return questions of which every third is correct and helped by the bad teacher, the others by the good one."""
    return [
        question(i, correct=i % 3 == 0, nodes=[node(0, SECOND if i % 3 == 0 else FIRST), node(1, NONE), FORCED])
        for i in range(count)
    ]


def diagnose_rows(rows: Sequence[dict[str, Any]]) -> tuple[Diagnosis, list[dict[str, Any]]]:
    nodes = [node_row for row in rows for node_row in make_node_rows(row, LOSSES, 0.5, 0.1)]
    return build_diagnosis(rows, nodes, TEACHERS, LOSSES, seed=0), nodes


def test_groups_and_counts() -> None:
    diagnosis, nodes = diagnose_rows(make_rows(30))
    group = {g.name: g for g in diagnosis.groups}
    everything = group["all nodes"]
    assert (everything.nodes, everything.forced, everything.flat, everything.questions) == (90, 30, 30, 30)
    values = {(c.teacher, c.loss): c for c in group["incorrect rollouts"].cells}
    assert values["good", "reverse_kl"].alignment.value == pytest.approx(1.0)
    assert values["bad", "forward_kl"].alignment.value == pytest.approx(-1.0)
    assert values["good", "reverse_kl"].nodes == 20
    mean = next(c for c in everything.cells if c.teacher == "good").alignment
    assert mean.value == pytest.approx(1 / 3)
    assert -1.0 < mean.low < 1 / 3 < mean.high < 1.0
    assert [c.alignment.value for c in everything.cells] == sorted(
        (c.alignment.value for c in everything.cells), reverse=True
    )
    assert group["correct rollouts"].cells[0].teacher == "bad"
    assert group["questions never solved"].nodes == 60
    assert group["questions sometimes solved"].nodes == 0
    assert group["questions sometimes solved"].lead is None
    assert [(w.name, w.nodes, w.flat, w.forced) for w in diagnosis.windows] == [("1", 30, 0, 0), ("2-3", 60, 30, 30)]
    assert everything.reliability == pytest.approx(1.0)
    # the teacher's token succeeds, the student's half of the time; flat and forced nodes count as 0
    q = math.exp(1.0) / (math.exp(1.0) + math.exp(-1.0))
    assert group["incorrect rollouts"].advantage["good"].value == pytest.approx((q - 0.5) / 3)
    assert diagnosis.by_question[0]["bad | reverse_kl"] == pytest.approx(1.0)
    costs = diagnosis.costs
    assert (costs.sampled_tokens, costs.prefix_tokens, costs.naive_prefix_tokens) == (3000, 360, 900)
    assert (costs.planned_nodes, costs.nodes) == (120, 90)
    assert diagnosis.signal == pytest.approx(1.0), "all of Q is 0 or 1: there is no noise"
    assert (
        json.loads(json.dumps(diagnosis.as_json(), allow_nan=False))["groups"][3]["lead"]["best"]["teacher"] == "good"
    )
    assert sum(n["value"] is None for n in nodes) == 30


def test_the_verdict_names_teacher_loss_and_uncertainty() -> None:
    sentences = write_verdict(diagnose_rows(make_rows(60))[0])
    text = "\n".join(sentences)
    assert "gets 33% of its rollouts right. At 60 of 180 nodes" in sentences[0]
    assert "At 60 there is only one token to choose, at 60 all tokens succeed equally often" in sentences[0]
    assert re.search(
        r"Incorrect rollouts: good with \w+, alignment \+1\.00 \[\+1\.00, \+1\.00\]: its step points towards success",
        text,
    )
    assert re.search(r"Correct rollouts: bad with \w+, alignment \+1\.00", text)
    assert re.search(r"ahead of bad with \w+ by \+2\.00", text)
    assert re.search(r"Pulls away from success over all nodes: bad with", text)
    assert "The budget held 180 of 240 planned nodes." in text
    assert "25% of the completions, 100% of the rollouts" in text
    assert "in front in 100% of the bootstrap's draws" in text
    assert "being picked for its value" not in text


def test_few_questions_give_no_verdict() -> None:
    text = "\n".join(write_verdict(diagnose_rows(make_rows(6))[0]))
    assert re.search(
        r"Incorrect rollouts: no verdict on 4 nodes of 4 questions, fewer than 10; good with \w+ has", text
    )
    assert "points towards" not in text
    assert "Pulls away" not in text


def test_noise_alone_is_called_no_effect() -> None:
    random = np.random.default_rng(0)
    rows = [question(i, correct=False, nodes=[node(0, random.integers(0, 3, (2, 2)).tolist())]) for i in range(60)]
    diagnosis, _ = diagnose_rows(rows)
    text = "\n".join(write_verdict(diagnosis))
    assert "Incorrect rollouts" not in text, "they are all there is"
    assert "no effect that can be told from none" in text
    assert "not told apart from" in text
    assert diagnosis.signal < 0.3


def test_a_token_without_probability_is_written_as_null() -> None:
    """Losses that contain log q are undefined at such a node, the others are not."""
    banned = node(0, FIRST)
    banned["logprob"] = {"itself": [Q(0.5), Q(0.5)], "good": [0.0, None], "bad": [Q(0.5), Q(0.4)]}
    (row,) = make_node_rows(question(0, correct=False, nodes=[banned]), LOSSES, 0.5, 0.1)
    assert row["alignment"]["good"] == {"forward_kl": pytest.approx(1.0), "reverse_kl": "infinite"}
    assert row["q"]["good"] == [1.0, 0.0]
    diagnosis = build_diagnosis([question(0, correct=False, nodes=[banned])], [row], TEACHERS, LOSSES, seed=0)
    assert diagnosis.groups[0].undefined["good"] == {"infinite": 1}
    assert "good gives a candidate no probability at 1 node that could say more." in write_verdict(diagnosis)


def test_nothing_defined_is_said_so() -> None:
    diagnosis, nodes = diagnose_rows([question(i, correct=False, nodes=[node(0, NONE), FORCED]) for i in range(20)])
    sentences = write_verdict(diagnosis)
    assert sentences[0].endswith("Nothing can be said about any teacher or loss.")
    assert "All nodes: no verdict. None of 40 nodes has an alignment." in sentences
    page = render_page(diagnosis, [question(0, correct=False, nodes=[FORCED])], nodes[:0], "s", 1)
    assert "Nothing can be said" in page
    assert diagnose_rows([question(0, correct=False, nodes=[])])[0].groups[0].nodes == 0


def test_the_page_shows_verdict_tables_and_text() -> None:
    rows = make_rows(30)
    diagnosis, nodes = diagnose_rows(rows)
    page = render_page(diagnosis, rows, nodes, "the-student", 2)
    for sentence in write_verdict(diagnosis):
        assert sentence.replace("'", "&#39;") in page
    assert page.count('<p class="asked">') == 2
    assert "question &lt;0&gt;" in page, "text of models is no markup"
    assert "&lt;b&gt;</span>" in page
    assert "<b>" not in page
    assert page.count("data-values=") == 6
    values = json.loads(re.findall(r'data-values="([^"]*)"', page)[0].replace("&#34;", '"'))
    assert set(values) == {f"{teacher} | {loss}" for teacher in TEACHERS for loss in LOSSES}
    assert "V 0.50" in page
    assert "(stands here)" in page
    assert "only &#39;y&#39; to choose" in page
    assert "[cut off]" in page
    assert "x\u21b5\n</span>" in page, "a node that is a line break can be seen"
    assert "2.5 times as many" in page
    assert "http:" not in page, "the page is self-contained"
    assert "https:" not in page
    assert "<select" not in render_page(diagnosis, rows, nodes, "the-student", 0)
