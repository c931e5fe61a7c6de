"""`genssd diagnose` on Markov chains of which every response is known, and on random models."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exact_tree import ExactTree, Floats
from support.progress import Recorder
from support.tiny_pair import TinyPair
from support.toys import EOS, edit_json, save_checkpoint, save_markov, token_of

from genssd.distill.answers.forms import CORRECT, WRONG, Verdict
from genssd.distill.diagnose.alignment import ideal_gradient, measure_alignment, renormalise, teacher_advantage
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.model_pools import Load
from genssd.distill.diagnose.readers import Templates
from genssd.distill.diagnose.run import DiagnoseSummary, run_diagnose
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.engine import Engine
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.sampling import Sampling

Write = Callable[..., Path]
LETTERS = [token_of("7"), token_of("8"), EOS]
STUDENT = np.array([[0.4, 0.1, -0.2], [0.6, 0.3, -0.1], [0.0, 0.0, 0.0]])
TEACHERS = {"strong": np.array([[1.2, -0.8, 0.1], [0.1, 0.7, 0.0], [0.0, 0.0, 0.0]]), "weak": STUDENT[::-1].copy()}
DEPTH = 5
FILES = ("questions.jsonl", "nodes.jsonl", "weighted_rows.jsonl", "summary.json", "diagnosis.html")


def finished_text(leaf: tuple[int, ...]) -> str | None:
    """Return the text of a response that ends within DEPTH tokens, None if it does not end."""
    return "".join("78"[letter] for letter in leaf[: leaf.index(2)]) if 2 in leaf else None


TREE = ExactTree(
    STUDENT, DEPTH, frozenset(leaf for leaf in product(range(3), repeat=DEPTH) if finished_text(leaf) == "77")
)
"""Tree of the student's responses to a prompt that ends in 7; "77" succeeds. Tokens after the end are summed out."""


def verdict_on_text(text: str, answer: str | None) -> Verdict:
    """Judge a response by its whole text."""
    return CORRECT if text == answer else WRONG


class World:
    """A student and two teachers, all of them Markov chains."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, logits in {"student": STUDENT, **TEACHERS}.items():
            save_markov(root / name, LETTERS, torch.tensor(logits, dtype=torch.float32))
        self.loaded: list[str] = []
        self.engines: dict[str, Engine] = {}

    def load(self, model: str, role: Role) -> Engine:
        """Return an engine over a model, as a caller that keeps engines does; `loaded` lists the calls."""
        name = Path(model).name
        self.loaded.append(name)
        if name not in self.engines:
            models = {"student": model} if role == "student" else {"teacher": model}
            settings: dict[str, Any] = {"dtype": "float32", "memory_bytes": 1 << 22, "max_num_seqs": 1024}
            self.engines[name] = Engine.from_pretrained(**models, **settings)
        return self.engines[name]

    def run(self, data: Path, out: Path, **options: Any) -> DiagnoseSummary:
        settings: dict[str, Any] = {
            "teacher": tuple(str(self.root / name) for name in TEACHERS),
            "max_tokens": DEPTH,
            "rollouts": 3,
            "top_k": 3,
            **({"teacher_top_k": 1} if options.get("teacher", TEACHERS) else {}),
            "min_probability": 0.0,
            "completions": 4,
            "budget": 10_000,
            **options,
        }
        config = DiagnoseConfig(student=str(self.root / "student"), data=str(data), output_dir=str(out), **settings)
        return run_diagnose(config, self.load, verify=verdict_on_text)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def data(write_rows: Write) -> Path:
    return write_rows([{"prompt": prompt, "answer": "77"} for prompt in ("7", "87", "7", "887", "77")])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def exact(node: dict[str, Any], rollout: list[int]) -> tuple[Floats, Floats]:
    """Return log p and Q of a node's candidates, by enumeration."""
    prefix = tuple(LETTERS.index(token) for token in rollout[: node["position"]])
    order = [LETTERS.index(token) for token in node["candidates"]]
    return TREE.log_p(prefix)[order], TREE.success_after(prefix)[order]


def test_an_exact_world(world: World, data: Path, tmp_path: Path) -> None:
    """Q, V, g*, advantage and alignment of every node are those of enumeration, up to the noise of the completions."""
    completions = 400
    world.run(data, tmp_path / "run", completions=completions, budget=10**6)
    rollouts = [[r["token_ids"] for r in row["rollouts"]] for row in lines(tmp_path / "run" / "questions.jsonl")]
    nodes, errors = lines(tmp_path / "run" / "nodes.jsonl"), []
    assert len(nodes) > 20
    for node in nodes:
        log_p, success = exact(node, rollouts[node["index"]][node["rollout"]])
        assert sorted(node["candidates"]) == sorted(LETTERS)
        assert node["mass"] == pytest.approx(1.0, abs=1e-5)
        np.testing.assert_allclose(node["p"], np.exp(log_p), atol=1e-5)
        bound = 4.5 * np.sqrt(np.clip(success * (1 - success), 0, None) / completions) + 1e-5  # log p is float32
        assert (np.abs(node["success"] - success) <= bound).all()
        assert abs(node["value"] - np.exp(log_p) @ success) <= np.exp(log_p) @ bound
        errors.append(
            (np.array(node["ideal"]) - ideal_gradient(log_p, success)) ** 2 / np.maximum(node["variance"], 1e-9)
        )
        assert abs(sum(node["ideal"])) < 1e-12
        state = LETTERS.index(rollouts[node["index"]][node["rollout"]][node["position"] - 1]) if node["position"] else 0
        order = [LETTERS.index(token) for token in node["candidates"]]
        for name, logits in TEACHERS.items():
            log_q = renormalise(logits[state][order])
            np.testing.assert_allclose(node["q"][name], np.exp(log_q), atol=1e-5)
            advantage = teacher_advantage(log_p, log_q, success)
            assert abs(node["advantage"][name] - advantage) <= np.abs(np.exp(log_q) - np.exp(log_p)) @ bound
            for loss, value in node["alignment"][name].items():
                truth = measure_alignment(loss, log_p, log_q, success, sampled_index=node["sampled"])
                if isinstance(truth, str) or np.ptp(success) < 0.25:
                    assert not isinstance(truth, str) or value == truth
                else:
                    assert abs(value - truth) < 0.25
    # the variance predicts the gradients' squared errors; flat nodes, which are exact, count as 0
    assert 0.3 < np.mean(errors) < 1.5


def test_cost_is_accounted_and_the_budget_kept(world: World, data: Path, tmp_path: Path) -> None:
    usage = world.load(str(world.root / "student"), "student").usage
    for budget in (1, 13, 60, 10_000):
        before = dataclasses.replace(usage)
        world.run(data, tmp_path / str(budget), budget=budget, teacher=(str(world.root / "weak"),))
        rows = lines(tmp_path / str(budget) / "questions.jsonl")
        costs = [row["spent"] for row in rows]
        assert all(cost["completions"] <= budget for cost in costs)
        assert sum(len(row["nodes"]) for row in rows) == 0 if budget == 1 else all(row["nodes"] for row in rows)
        written = sum(len(r["token_ids"]) for row in rows for r in row["rollouts"])
        assert sum(cost["sampled_tokens"] for cost in costs) == usage.sampled_tokens - before.sampled_tokens - written
        assert sum(cost["forced_tokens"] for cost in costs) == usage.forced_tokens - before.forced_tokens
        for row, cost in zip(rows, costs, strict=True):
            forced = [
                (node["position"], node["candidates"][j])
                for node in row["nodes"]
                for j in range(len(node["candidates"]))
                if node["candidates"][j] != EOS and node["position"] < DEPTH - 1
            ]
            assert cost["completions"] == 4 * len(forced)
            assert cost["naive_prefix_tokens"] == sum(len(row["prompt"]) + position + 1 for position, _ in forced)
            deepest = [0] * 3
            for node in row["nodes"]:
                if node["position"] < DEPTH - 1:
                    deepest[node["rollout"]] = max(deepest[node["rollout"]], node["position"])
            assert cost["forced_tokens"] == len(forced)
            assert cost["prefix_tokens"] == len(row["prompt"]) + sum(deepest)
    planned = [sum(row["planned_nodes"] for row in lines(tmp_path / b / "questions.jsonl")) for b in ("13", "10000")]
    assert planned[0] == planned[1] == sum(len(row["nodes"]) for row in rows)


def test_a_resumed_run_ends_with_the_same_bytes(world: World, data: Path, tmp_path: Path) -> None:
    complete, torn = tmp_path / "complete", tmp_path / "torn"
    world.run(data, complete)
    world.run(data, torn)
    journal = torn / "questions.jsonl"
    size = len(journal.read_bytes())
    with pytest.raises(InputError, match="pass --resume"):
        world.run(data, torn)
    for cut in (size // 2, size - 1, 10):
        journal.write_bytes((complete / "questions.jsonl").read_bytes()[:cut])
        world.run(data, torn, resume=True)
        assert all((torn / name).read_bytes() == (complete / name).read_bytes() for name in FILES)
    for change, message in (
        ({"completions": 6}, "begun with completions=4, not 6"),
        ({"sampling": Sampling(temperature=0.5)}, "begun with sampling.temperature=1.0, not 0.5"),
        ({"teacher": (str(world.root / "weak"),)}, "begun with teacher="),
    ):
        with pytest.raises(InputError, match=message):
            world.run(data, torn, resume=True, **change)
    # a finished run is drawn again without a model; losses may be others then
    world.loaded.clear()
    redrawn = world.run(data, torn, resume=True, losses=("jsd",), beta=0.9)
    assert not world.loaded
    assert redrawn.diagnosis.losses == ("jsd",)
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[1:]))  # the user removed a damaged line
    world.run(data, torn, resume=True)
    first, *others = (complete / "questions.jsonl").read_text().splitlines()
    assert journal.read_text().splitlines() == [*others, first]
    assert all((torn / name).read_bytes() == (complete / name).read_bytes() for name in FILES if name != journal.name)


def test_results_do_not_depend_on_which_questions_are_asked_beside(world: World, data: Path, tmp_path: Path) -> None:
    world.run(data, tmp_path / "all")
    world.run(data, tmp_path / "some", limit=3)
    rows = [lines(tmp_path / name / "questions.jsonl") for name in ("all", "some")]
    assert rows[0][:3] == rows[1]
    world.run(data, tmp_path / "some", resume=True)  # with more of the data
    assert all((tmp_path / "some" / name).read_bytes() == (tmp_path / "all" / name).read_bytes() for name in FILES)
    assert rows[0][0]["rollouts"] != rows[0][2]["rollouts"], "equal prompts are answered anew"


def test_models_are_in_memory_one_at_a_time(world: World, data: Path, tmp_path: Path) -> None:
    world.loaded.clear()
    world.run(data, tmp_path / "two", contexts=("answer",), limit=1)
    assert world.loaded == ["student", "strong", "weak", "strong", "student"]
    world.loaded.clear()
    progress = Recorder()
    config = DiagnoseConfig(
        student=str(world.root / "student"), contexts=("answer",), data=str(data), output_dir=str(tmp_path / "own"),
        max_tokens=DEPTH,
    )  # fmt: skip
    run_diagnose(config, world.load, progress)
    assert world.loaded == ["student"]
    assert progress.stages == [
        "rollouts",
        "the rollouts are read as 'itself'",
        "the rollouts are read as 'itself + answer'",
        "forced tokens",
    ]


def test_a_model_is_gone_before_the_next_one_is_loaded(world: World, data: Path, tmp_path: Path) -> None:
    seen: list[weakref.ref[ModelRunner]] = []

    def load(model: str, role: Role) -> Engine:
        assert all(runner() is None for runner in seen)
        models = {"student": model} if role == "student" else {"teacher": model}
        engine = Engine.from_pretrained(**models, memory_bytes=1 << 20)  # type: ignore[arg-type]
        seen.append(weakref.ref(engine._resources.runner(role)))
        return engine

    teachers = tuple(str(world.root / name) for name in TEACHERS)
    config = DiagnoseConfig(
        student=str(world.root / "student"), teacher=teachers, data=str(data), output_dir=str(tmp_path / "run"),
        max_tokens=DEPTH, rollouts=1, limit=2,
    )  # fmt: skip
    run_diagnose(config, load)
    assert len(seen) == 5


def test_a_context_that_says_nothing_is_the_student_itself(world: World, data: Path, tmp_path: Path) -> None:
    """A chain sees the last letter alone: with the question at the end of the prompt it is its own teacher."""
    templates = Templates(other="{text} {question}")
    summary = world.run(data, tmp_path / "run", contexts=("answer",), templates=templates)
    nodes = lines(tmp_path / "run" / "nodes.jsonl")
    flat = [node for node in nodes if len(set(node["success"])) == 1]
    for node in nodes:
        assert set(node["alignment"]["itself + answer"].values()) == {"flat" if node in flat else "same"}
        assert node["advantage"]["itself + answer"] == pytest.approx(0.0, abs=1e-6)
    group = summary.diagnosis.groups[0]
    assert (group.nodes, group.flat) == (len(nodes), len(flat))
    assert group.undefined["itself + answer"] == {"same": len(nodes) - len(flat)}
    assert "itself + answer says what the student says at" in (tmp_path / "run" / "diagnosis.html").read_text()


def test_contexts_do_not_change_within_a_run(world: World, write_rows: Write, tmp_path: Path) -> None:
    row = {"prompt": "7", "answer": "77"}
    world.run(write_rows([{**row, "hint": "a"}]), tmp_path / "run", contexts=("hint",), teacher=())
    with pytest.raises(InputError, match="row 0 has other contexts than"):
        world.run(write_rows([{**row, "hint": "b"}]), tmp_path / "run", contexts=("hint",), teacher=(), resume=True)


def test_tokens_without_probability_are_not_tried(world: World, data: Path, tmp_path: Path) -> None:
    """Where one token is left to try, no completion is written."""
    world.run(data, tmp_path / "run", min_probability=0.9, teacher=(str(world.root / "strong"),))
    for row in lines(tmp_path / "run" / "questions.jsonl"):
        assert row["spent"]["completions"] == row["spent"]["forced_tokens"] == 0
        assert all(len(node["candidates"]) == 1 for node in row["nodes"])
    for node in lines(tmp_path / "run" / "nodes.jsonl"):
        assert set(node["alignment"]["strong"].values()) == {"forced"}
        assert node["value"] is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["groups"][0]["forced"] == summary["groups"][0]["nodes"] > 0


def test_every_reader_sees_its_own_prompt(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """Log-probabilities of all candidates equal those of scoring prompt, prefix and candidate together."""
    data = write_rows([{"question": f"{i}+{i}?", "answer": str(2 * i), "hint": f"It is {2 * i}."} for i in range(2)])
    config = DiagnoseConfig(
        student=str(tiny_pair.student), teacher=(str(tiny_pair.teacher),), contexts=("hint",), context_readers="all",
        data=str(data), output_dir=str(tmp_path / "run"), max_tokens=12, rollouts=2, min_probability=0.0, seed=1,
    )  # fmt: skip
    run_diagnose(config, lambda model, role: tiny_pair.engine)
    for row in lines(tmp_path / "run" / "questions.jsonl"):
        question, hint = row["prompt"][0]["content"], f"It is {row['answer']}."
        plain, hinted = ([{"role": "user", "content": text}] for text in (question, f"{question}\n\nHint: {hint}"))
        prompts = {"itself": plain, "itself + hint": hinted, "teacher": plain, "teacher + hint": hinted}
        assert row["nodes"]
        for node in row["nodes"]:
            before = row["rollouts"][node["rollout"]]["token_ids"][: node["position"]]
            for name, prompt in prompts.items():
                role: Role = "student" if name.startswith("itself") else "teacher"
                responses = [[*before, token] for token in node["candidates"]]
                stats = tiny_pair.engine.score([prompt] * len(responses), responses, model=role)
                expected = [float(response_stats.logprob[-1]) for response_stats in stats]
                np.testing.assert_allclose(node["logprob"][name], expected, atol=2e-3)
    page = (tmp_path / "run" / "diagnosis.html").read_text()
    assert "Nothing can be said about any teacher or loss." in page


def test_what_cannot_be_asked_is_said_before_anything_runs(
    world: World, data: Path, write_rows: Write, tmp_path: Path
) -> None:
    def refused(kind: type[Exception], message: str, path: Path = data, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            world.run(path, tmp_path / "refused", **options)

    world.loaded.clear()
    refused(InputError, "needs a teacher or a context", teacher=())
    refused(InputError, "completions must be even and at least 2, not 3", completions=3)
    refused(InputError, "budget must be at least 1, not 0", budget=0)
    refused(InputError, "min_probability must lie in", min_probability=1.0)
    refused(InputError, "beta must lie in", beta=1.0)
    refused(InputError, "losses must name each loss once", losses=("jsd", "jsd"))
    refused(InputError, "line 1: the context 'hint' must be text or a number, and is missing", contexts=("hint",))
    refused(InputError, "line 1: no answer", write_rows([{"prompt": "8"}], "b.jsonl"))
    long = write_rows([{"prompt": "7", "answer": "7", "hint": "7" * 600}], "long.jsonl")
    refused(InputError, r"line 1: the prompt of 'itself \+ hint' has \d+ tokens", long, contexts=("hint",))
    assert world.loaded == []


def test_a_teacher_with_another_tokenizer_is_refused(world: World, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_checkpoint(other)
    fields = json.loads((other / "tokenizer.json").read_text())
    renamed = [{**token, "content": token["content"].replace("im_end", "stop")} for token in fields["added_tokens"]]
    edit_json(other / "tokenizer.json", added_tokens=renamed)
    with pytest.raises(InputError, match=r"use the same ids for different tokens: id 256 is '<\|im_end\|>' in one and"):
        world.run(data, tmp_path / "run", teacher=(str(other),))
    vocabulary = fields["model"]["vocab"]
    edit_json(other / "tokenizer.json", model={**fields["model"], "vocab": {**vocabulary, "!": 1, '"': 0}})
    with pytest.raises(InputError, match="have different vocabularies: id 0 is"):
        world.run(data, tmp_path / "run", teacher=(str(other),))


def test_added_tokens_of_the_teacher_alone_are_no_candidates(world: World, data: Path, tmp_path: Path) -> None:
    """The student cannot read them, so it is not forced to write them."""
    other = tmp_path / "other"
    save_checkpoint(other, vocab_size=300)
    fields = json.loads((other / "tokenizer.json").read_text())
    more = [{**fields["added_tokens"][-1], "id": 259 + i, "content": f"<more{i}>"} for i in range(40)]
    edit_json(other / "tokenizer.json", added_tokens=[*fields["added_tokens"], *more])
    summary = world.run(data, tmp_path / "run", teacher=(str(other),), teacher_top_k=20, min_probability=0.0)
    nodes = lines(summary.output_dir / "nodes.jsonl")
    assert max(len(node["candidates"]) for node in nodes) > 10
    assert max(token for node in nodes for token in node["candidates"]) < 259


def test_the_loader_is_the_configs_own(world: World, data: Path, tmp_path: Path) -> None:
    """Without a loader of the caller's, models are loaded by the options of the config."""
    config = DiagnoseConfig(
        student=str(world.root / "student"), teacher=(str(world.root / "strong"),), data=str(data), limit=1,
        output_dir=str(tmp_path / "run"), max_tokens=DEPTH, memory_bytes=1 << 22,
    )  # fmt: skip
    load: Load | None = None
    assert run_diagnose(config, load).diagnosis.questions == 1
