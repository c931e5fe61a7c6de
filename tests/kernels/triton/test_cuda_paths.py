"""The engine and the training on a fake CUDA device: no devices are mixed, and values are those of the CPU.

The kernels run in Triton's interpreter, and captured steps are recorded and run again (support/fake_cuda.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_cuda import FakeCuda
from support.families import FAMILY_CASES, save_family
from support.tiny_pair import TinyPair
from support.toys import Pair, edit_json, save_checkpoint, save_tokenizer
from support.training_runs import config_for, metrics

from genssd.distill.answers.forms import CORRECT, WRONG, Verdict
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.run import run_diagnose
from genssd.distill.score.leaf import run_leaf
from genssd.distill.score.leaf_config import LeafConfig
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.key_attention_options import KeyAttentionOptions
from genssd.distill.train.rollout_options import RolloutOptions
from genssd.distill.train.trainer import run_train
from genssd.engine.common.model_choices import Role
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling

DEVICE = "cuda:0"
FAMILIES = ("ministral3", "smollm3", "granite", "gemma2", "gemma3", "phi4-mini", "olmo3", "mixtral", "gpt-oss")
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A random teacher and student whose trajectories end and differ."""
    base = tmp_path_factory.mktemp("pair")
    models = [save_checkpoint(base / role, "qwen3", seed=s, scale=12.0) for s, role in enumerate(("big", "small"))]
    for role in ("big", "small"):
        for file in ("config.json", "generation_config.json"):
            edit_json(base / role / file, eos_token_id=list(range(250, 257)))
    return Pair(base / "big", base / "small", *models)


PROMPTS = [list(range(40, 60)), [7, 8, 9]]


def test_scores(pair: Pair) -> None:
    responses = [[1, 2, 3, 4], [5, 6]]
    expected = pair.engine().score(PROMPTS, responses, model="student")
    with FakeCuda() as device:
        scores = pair.engine(device=DEVICE).score(PROMPTS, responses, model="student")
        assert "genssd::linear_logprob" in device.operators
        for ours, plain in zip(scores, expected, strict=True):
            torch.testing.assert_close(ours.logprob.cpu(), plain.logprob, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(ours.entropy.cpu(), plain.entropy, atol=1e-4, rtol=1e-4)


def test_activations(pair: Pair) -> None:
    """The means that the criterion scas reads."""
    expected = pair.engine().mean_activations(PROMPTS[0], [1, 2, 3, 4, 5], 1)
    with FakeCuda():
        means = pair.engine(device=DEVICE).mean_activations(PROMPTS[0], [1, 2, 3, 4, 5], 1)
    torch.testing.assert_close(means.response_F, expected.response_F, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(means.prompt_F, expected.prompt_F, atol=1e-4, rtol=1e-4)
    assert means.prompt_nll == pytest.approx(expected.prompt_nll, rel=1e-4)


@pytest.mark.parametrize(("kind", "options"), [case for case in FAMILY_CASES if case.id in FAMILIES])
def test_families(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Scores, and drawn tokens over captured steps, of what only some families compute: experts, sinks, scales."""
    save_family(tmp_path, kind, options)
    save_tokenizer(tmp_path)
    settings: dict[str, Any] = {"dtype": "float32", "memory_bytes": 1 << 22}
    writing: dict[str, Any] = {"model": "student", "max_tokens": 3, "seed": 1}
    plain = Engine.from_pretrained(student=tmp_path, **settings)
    expected = plain.score(PROMPTS[:1], [[1, 2, 3]]), plain.generate(PROMPTS[1:], **writing)
    with FakeCuda():
        engine = Engine.from_pretrained(student=tmp_path, device=DEVICE, **settings)
        (scored,), ((written,),) = engine.score(PROMPTS[:1], [[1, 2, 3]]), engine.generate(PROMPTS[1:], **writing)
        torch.testing.assert_close(scored.logprob.cpu(), expected[0][0].logprob, atol=1e-3, rtol=1e-3)
        assert written.token_ids == expected[1][0][0].token_ids


SEARCHES: dict[str, dict[str, Any]] = {
    "beam": {"beam": 2, "teacher_topk": 3},
    "filtered": {"sampling": Sampling(temperature=0.8, top_p=0.9)},
}


@pytest.mark.parametrize(("name", "student_stream"), [("filtered", False), ("beam", True)])
def test_trajectories(name: str, student_stream: bool, pair: Pair) -> None:
    """Also over captured steps: the second token of a chunk is decoded by a replay."""
    options: dict[str, Any] = {"candidates": 2, "chunk": Chunk(tokens=3, until=None), "max_tokens": 6, "seed": 3}
    options |= SEARCHES[name]
    expected = pair.engine().select_expand(PROMPTS, **options)
    with FakeCuda() as device:
        engine = pair.engine(device=DEVICE, student_stream=student_stream)
        selections = engine.select_expand(PROMPTS, **options)
        assert max(graph.replays for graph in device.graphs) > 1
        for ours, plain in zip(selections, expected, strict=True):
            assert ours.best.token_ids == plain.best.token_ids


def test_reverse_speculation(pair: Pair) -> None:
    rules = ReverseSpeculation(probability=0.002, top=60, tries=2, student=Sampling())
    expected = pair.engine().generate(PROMPTS, max_tokens=3, rsd=rules, seed=1)
    with FakeCuda():
        completions = pair.engine(device=DEVICE).generate(PROMPTS, max_tokens=3, rsd=rules, seed=1)
    for (ours,), (plain,) in zip(completions, expected, strict=True):
        assert (ours.token_ids, ours.substituted) == (plain.token_ids, plain.substituted)


def judge_by_length(text: str, answer: str | None) -> Verdict:
    return CORRECT if len(text) % 2 else WRONG


def test_a_greedy_completion_beside_sampled_ones(pair: Pair) -> None:
    options: dict[str, Any] = {"n": 2, "sampling": Sampling(top_p=0.9), "max_tokens": 2, "greedy_first": True}
    expected = {g.index: g.sampled for g in pair.engine().iter_generate(PROMPTS, **options)}
    with FakeCuda():
        outcomes = {g.index: g.sampled for g in pair.engine(device=DEVICE).iter_generate(PROMPTS, **options)}
        for index, completions in outcomes.items():
            assert [c.token_ids for c in completions] == [c.token_ids for c in expected[index]]


def test_diagnosis(pair: Pair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows([{"prompt": "7", "answer": "77"}])

    def diagnose(name: str, **device: str) -> Any:
        def load(model: str, role: Role) -> Engine:
            models = {"student" if role == "student" else "teacher": model}
            return Engine.from_pretrained(**models, dtype="float32", memory_bytes=1 << 22, **device)  # type: ignore[arg-type]

        config = DiagnoseConfig(
            student=str(pair.student), teacher=(str(pair.teacher),), data=str(data), output_dir=str(tmp_path / name),
            max_tokens=2, rollouts=1, completions=2, top_k=2, teacher_top_k=1, min_probability=0.0,
        )  # fmt: skip
        run_diagnose(config, load, verify=judge_by_length)
        return [json.loads(row)["rollouts"] for row in (tmp_path / name / "questions.jsonl").read_text().splitlines()]

    expected = diagnose("cpu")
    with FakeCuda():
        assert diagnose("cuda", device=DEVICE) == expected


def test_traces_without_distracting_words(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows([{"question": "Tom has 3 and 4 pens. How many?", "generations": ["He has 3 + 4 = 7."]}])

    def leave_out(name: str, **device: str) -> list[str]:
        config = LeafConfig(
            student=str(tiny_pair.student), teacher=str(tiny_pair.teacher), data=(str(data),), share=0.2,
            output_dir=str(tmp_path / name), **device,
        )  # fmt: skip
        run_leaf(config)
        rows = (tmp_path / name / "counterfactuals.jsonl").read_text().splitlines()
        return [json.loads(row)["left_out"] for row in rows]

    expected = leave_out("cpu")
    with FakeCuda():
        assert leave_out("cuda", device=DEVICE) == expected


def test_training_on_the_teachers_top_k_of_a_selection(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows([{"question": f"{i}+{i}?"} for i in range(1)], "problems.jsonl")
    with FakeCuda():
        engine = Engine.from_pretrained(
            tiny_pair.teacher, tiny_pair.student, memory_bytes=1 << 22, dtype="float32", device=DEVICE
        )
        select = SelectConfig(
            teacher=str(tiny_pair.teacher), student=str(tiny_pair.student), data=str(data),
            output_dir=str(tmp_path / "select"), candidates=2, chunk=Chunk(tokens=2, until=None), max_tokens=2,
            teacher_topk=5,
        )  # fmt: skip
        rows = run_select(select, engine).path
    assert_trains_the_same(tiny_pair, rows, tmp_path, {"kd_ratio": 0.5, "statuses": ("finished", "length")})


TRAININGS: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": 2},
    "packed": {"layout": "pack", "gradient_checkpointing": True},
    "tree": {"layout": "tree"},
    "jsd": {"kd_ratio": 0.5, "kd_loss": "jsd", "mask_special_tokens": True},
    "top-k": {"kd_ratio": 0.5, "kd_topk": 5},
    "student's top-k": {
        "kd_ratio": 0.5, "kd_loss": "reverse_kl", "kd_topk": 5, "kd_topk_of": "student", "kd_tail": "policy_gradient",
    },
    "standardized": {"kd_ratio": 0.5, "kd_standardize": True},
    "spans": {"kd_ratio": 0.5, "kd_loss": "span_kl"},
    "sorted": {"kd_ratio": 0.5, "kd_loss": "uld"},
    "on-policy": {"kd_ratio": 0.5, "lmbda": 1.0, "rollout": RolloutOptions(max_tokens=2, memory_bytes=1 << 20)},
    "sampled": {
        "kd_ratio": 0.5, "lmbda": 1.0, "kd_loss": "sampled_reverse_kl",
        "rollout": RolloutOptions(max_tokens=3, memory_bytes=1 << 20),
    },
    "key attention": {"key_attention": KeyAttentionOptions(weight=1.0)},
    "key attention of means": {"key_attention": KeyAttentionOptions(weight=1.0, rows="mean")},
}  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_trainings(name: str, tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    changes = dict(TRAININGS[name])
    if changes.get("kd_ratio") or changes.get("key_attention"):
        changes["teacher_model_name_or_path"] = str(tiny_pair.teacher)
    rows = [{"prompt": f"{i} and {i + 1} is", "completion": f"{2 * i + 1}. So {i}!"} for i in range(2)]
    assert_trains_the_same(tiny_pair, write_rows(rows), tmp_path, changes)


def assert_trains_the_same(pair: TinyPair, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    options = {"gradient_accumulation_steps": 1, "max_steps": 1, **changes}
    run_train(config_for(pair, data, tmp_path / "cpu", **options))
    with FakeCuda():
        run_train(config_for(pair, data, tmp_path / "cuda", device=DEVICE, **options))
    for ours, plain in zip(metrics(tmp_path / "cuda"), metrics(tmp_path / "cpu"), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3, abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)
