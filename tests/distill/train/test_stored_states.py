"""A training from stored hidden states of the teacher, against transformers and against the teacher in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair
from support.toys import save_checkpoint
from support.training_runs import config_for, metrics
from transformers import AutoModelForCausalLM

from genssd.distill.data.state_store import locate_states
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.kept_states import KeptText, add_states
from genssd.distill.select.run import run_select
from genssd.distill.train.key_attention_options import KeyAttentionOptions
from genssd.distill.train.loss_options import LossOptions
from genssd.distill.train.token_weight_options import TokenWeightOptions
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.setup.head_loading import load_head
from genssd.kernels.divergence import linear_divergence

Write = Callable[..., Path]
PROBLEMS = [{"question": f"{i}+{i}?", "answer": f"{2 * i}"} for i in range(4)]
BOTH = ("finished", "length")


def select(pair: TinyPair, write_rows: Write, out: Path, dtype: Any) -> Path:
    config = SelectConfig(
        teacher=str(pair.teacher), student=str(pair.student), data=str(write_rows(PROBLEMS, "problems.jsonl")),
        output_dir=str(out), candidates=2, chunk=Chunk(tokens=3, until=None), max_tokens=9, teacher_states=dtype,
    )  # fmt: skip
    return run_select(config, pair.engine).path


def generate(pair: TinyPair, write_rows: Write, out: Path, **options: Any) -> Path:
    config = GenerateConfig(
        teacher=str(pair.teacher), student=str(pair.student), data=str(write_rows(PROBLEMS, "problems.jsonl")),
        output_dir=str(out), max_tokens=6, teacher_states="float32", **options,
    )  # fmt: skip
    run_generate(config, pair.engine)
    return out / "responses.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@torch.no_grad()
def states_of(directory: Path, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """The states that predict the ids, by transformers in float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    hidden: torch.Tensor = model.model(torch.tensor([[*prompt, *ids]])).last_hidden_state[0]
    return hidden[len(prompt) - 1 : -1]


@pytest.mark.parametrize("method", ["select", "sample", "rsd", "alternate"])
def test_stored_states_are_those_of_transformers(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, method: str
) -> None:
    if method == "select":
        path = select(tiny_pair, write_rows, tmp_path / "run", "float32")
    else:
        path = generate(tiny_pair, write_rows, tmp_path / "run", method=method)
    rows = read_rows(path)
    assert len(rows) == len(PROBLEMS)
    for row in rows:
        place = locate_states(row["teacher_states"], path.parent, len(row["completion_ids"]), "row")
        assert place is not None
        expected = states_of(tiny_pair.teacher, row["prompt_ids"], row["completion_ids"])
        torch.testing.assert_close(place.read().double(), expected, atol=2e-5, rtol=2e-5)


def test_states_of_several_responses_are_refused() -> None:
    message = r"n must be 1, not 3; the best of several .* --candidates 3 --chunk\.tokens 50 --teacher-states bfloat16"
    with pytest.raises(InputError, match=message):
        GenerateConfig(teacher="t", student="s", data="d", n=3, max_tokens=50, teacher_states="bfloat16")


LOSSES: list[dict[str, Any]] = [
    {"kd_loss": "forward_kl"},
    {"kd_loss": "reverse_kl", "temperature": 2.0},
    {"kd_loss": "jsd", "layout": "tree"},
    {"kd_loss": "skew_reverse_kl", "adaptive_alpha": True},
    {"kd_standardize": True},
    {"kd_loss": "reverse_kl", "kd_topk": 4, "kd_topk_of": "student"},
    {"kd_loss": "forward_kl", "token_weights": {"entropy_of": "teacher", "fraction": 0.5}},
]


@pytest.fixture(scope="module")
def rows_by_dtype(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")

    def write(rows: list[Any], name: str) -> Path:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / name

    return {dtype: select(tiny_pair, write, folder / dtype, dtype) for dtype in ("float32", "bfloat16")}


def train(pair: TinyPair, data: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    run_train(
        config_for(
            pair, data, out, teacher_model_name_or_path=str(pair.teacher), statuses=BOTH, max_steps=2, logging_steps=1,
            **{"kd_ratio": 0.7, **options},
        )
    )  # fmt: skip
    return metrics(out)


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: "-".join(map(str, options.values()))[:30])
def test_the_training_is_that_of_the_teacher_in_memory(
    tiny_pair: TinyPair, rows_by_dtype: dict[str, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    if "token_weights" in options:
        options = {**options, "token_weights": TokenWeightOptions(**options["token_weights"])}
    live = train(tiny_pair, rows_by_dtype["float32"], tmp_path / "live", **options)
    for dtype, tolerance in (("float32", 2e-5), ("bfloat16", 2e-2)):
        stored = train(tiny_pair, rows_by_dtype[dtype], tmp_path / dtype, kd_states=True, **options)
        assert len(live) == len(stored) == 2
        for one, other in zip(live, stored, strict=True):
            for name in ("loss", "divergence", "grad_norm"):
                assert other[name] == pytest.approx(one[name], rel=tolerance, abs=tolerance / 10)


def test_gradients_differ_by_the_rounding_of_the_states_alone(
    tiny_pair: TinyPair, rows_by_dtype: dict[str, Path]
) -> None:
    """The gradient of reverse KL in the student's states, against autograd in float64 over whole logits."""
    path = rows_by_dtype["bfloat16"]
    row = read_rows(path)[0]
    place = locate_states(row["teacher_states"], path.parent, len(row["completion_ids"]), "row")
    assert place is not None
    teacher = load_head(tiny_pair.teacher, torch.float32, torch.device("cpu")).weight
    student = load_head(tiny_pair.student, torch.float32, torch.device("cpu")).weight
    assert isinstance(teacher, torch.Tensor)
    assert isinstance(student, torch.Tensor)
    exact = states_of(tiny_pair.teacher, row["prompt_ids"], row["completion_ids"])
    hidden = states_of(tiny_pair.student, row["student_prompt_ids"], row["completion_ids"]).float()
    weight = torch.ones(len(hidden))
    leaf = hidden.clone().requires_grad_()
    linear_divergence(
        leaf, student, place.read().float(), teacher, kind="reverse_kl", row_weight=weight
    ).total.backward()
    vocabulary = min(len(student), len(teacher))
    gradients = []
    for states in (exact, place.read().double()):
        free = hidden.double().requires_grad_()
        p = (free @ student[:vocabulary].double().T).log_softmax(-1)
        q = (states @ teacher[:vocabulary].double().T).log_softmax(-1)
        (p.exp() * (p - q)).sum().backward()
        assert free.grad is not None
        gradients.append(free.grad)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), gradients[1], atol=1e-5, rtol=1e-4)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 0.0 < error < 2**-5


def test_states_of_the_lead_are_those_of_the_teacher_in_memory() -> None:
    read = KeptText.of((1, 2, 7, 8), (3, 7, 8), 2, (5, 6))
    assert read == KeptText(prompt_ids=(1, 2), ids=(7, 8, 5, 6)), "both prompts end in the lead"
    read = KeptText.of((1, 2), (3, 7, 8), 2, (5, 6))
    assert read == KeptText(prompt_ids=(3,), ids=(7, 8, 5, 6)), "the teacher reads the student's prompt"
    assert KeptText.of((1, 2), (3, 7), 0, (5,)) == KeptText(prompt_ids=(1, 2), ids=(5,))
    assert KeptText.of((1,), (1,), 0, ()) is None


def test_a_response_waits_for_pages(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [KeptText(prompt_ids=(5, 6, 7), ids=(8, 9, i)) for i in range(10, 13)]
    expected = [tiny_pair.engine.hidden_states(text.prompt_ids, text.ids) for text in texts]
    calls = 0
    read = type(tiny_pair.engine).hidden_states

    def refuse_some(engine: Any, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls in (1, 3):
            raise CapacityError("no page is free")
        return read(engine, *arguments)

    monkeypatch.setattr(type(tiny_pair.engine), "hidden_states", refuse_some)
    outcomes = list(add_states(tiny_pair.engine, "float32", [(i, "row", text) for i, text in enumerate(texts)]))
    assert [place for place, _, _ in outcomes] == [0, 1, 2]
    for (_, _, states), other in zip(outcomes, expected, strict=True):
        assert isinstance(states, torch.Tensor)
        assert torch.equal(states, other.float().cpu())
    monkeypatch.setattr(
        type(tiny_pair.engine), "hidden_states", lambda *_: (_ for _ in ()).throw(CapacityError("full"))
    )
    assert [s for _, _, s in add_states(tiny_pair.engine, "float32", [(0, "r", texts[0])])] == ["teacher_states: full"]


def test_the_engine_refuses_what_it_cannot_read(tiny_pair: TinyPair) -> None:
    with pytest.raises(InputError, match="the response is empty"):
        tiny_pair.engine.hidden_states([1, 2], [])
    with pytest.raises(InputError, match="outside the teacher's vocabulary"):
        tiny_pair.engine.hidden_states([1, 2], [1 << 30])
    with pytest.raises(CapacityError, match="positions"):
        tiny_pair.engine.hidden_states([1, 2], [5] * 5000)


def test_what_a_training_refuses(
    tiny_pair: TinyPair, rows_by_dtype: dict[str, Path], write_rows: Write, tmp_path: Path
) -> None:
    data = rows_by_dtype["float32"]
    teacher = str(tiny_pair.teacher)
    given: dict[str, Any] = {"kd_ratio": 0.5, "kd_states": True, "statuses": BOTH, "max_steps": 1}
    plain = write_rows([{"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match=r"line 1: no teacher_states of this student's tokenizer, which kd_states"):
        run_train(config_for(tiny_pair, plain, tmp_path / "a", teacher_model_name_or_path=teacher, **given))
    other = tmp_path / "other"
    save_checkpoint(other, "llama", seed=9)
    with pytest.raises(InputError, match=r"line 1: teacher_states are of the teacher [0-9a-f]{16}, and the checkpoint"):
        run_train(config_for(tiny_pair, data, tmp_path / "b", teacher_model_name_or_path=str(other), **given))
    damaged = tmp_path / "damaged"
    shutil.copytree(data.parent, damaged)
    content = bytearray((damaged / "teacher_states.bin").read_bytes())
    content[3] ^= 1
    (damaged / "teacher_states.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"holds no hidden states at byte 0: it is damaged"):
        run_train(
            config_for(tiny_pair, damaged / data.name, tmp_path / "c", teacher_model_name_or_path=teacher, **given)
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_model_name_or_path": None}, "need the head of their teacher; give --teacher-model-name-or-path"),
        ({"lmbda": 0.5}, "what the student writes in on-policy steps has no stored states; give lmbda 0"),
        ({"kd_loss": "distillm2"}, "pairs have no stored states, so that kd_loss distillm2 needs the whole teacher"),
        ({"kd_loss": "uld"}, "stored token by token, so that kd_loss uld needs"),
    ],
)
def test_options_that_stored_states_cannot_serve(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"kd_ratio": 0.5, "kd_states": True, "teacher_model_name_or_path": "t"}
    with pytest.raises(InputError, match=message):
        LossOptions(**{**given, **changes})
    with pytest.raises(InputError, match="nothing of the teacher's attention"):
        LossOptions(**given, key_attention=KeyAttentionOptions(weight=1.0))


def test_teachers_that_have_no_states_here_are_refused() -> None:
    given: dict[str, Any] = {"student": "s", "data": "d", "teacher_states": "bfloat16"}
    for config in (SelectConfig, GenerateConfig):
        with pytest.raises(InputError, match=r"teacher_states: the server http://host:8000/v1 gives no hidden states"):
            config(teacher="http://host:8000/v1", **given)
    with pytest.raises(InputError, match="teacher_states are of one teacher"):
        SelectConfig(teacher=("a", "b"), **given)
    with pytest.raises(InputError, match="teacher_states must be"):
        SelectConfig(**{**given, "teacher": "t", "teacher_states": "int8"})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 5.0, "tie_word_embeddings": False}),
        ("stablelm", {}),  # transformers computes its states
        ("stablelm", {"tie_word_embeddings": True}),
    ],
)
def test_the_head_alone_is_that_of_the_whole_model(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    save_checkpoint(tmp_path / kind, kind, seed=3, **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)
    head = load_head(tmp_path / kind, torch.float32, torch.device("cpu"))
    assert isinstance(head.weight, torch.Tensor)
    assert torch.equal(head.weight, model.get_output_embeddings().weight)
    hidden = model.model(torch.arange(6)[None]).last_hidden_state[0]
    torch.testing.assert_close(head.logits(head.divide(hidden)), model(torch.arange(6)[None]).logits[0])
