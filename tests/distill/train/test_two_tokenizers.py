"""Training a student against a teacher with another tokenizer, over the spans of text that both cut out."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.byte_tokenizers import TEXTS, build, save
from support.doctor import open_for
from support.tiny_pair import TinyPair
from support.training_runs import config_for, metrics
from transformers import AutoModelForCausalLM

from genssd import Engine
from genssd.distill.data.example_files import read_examples
from genssd.distill.doctor.token_checks import check_tokenizers
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.build import read_inputs
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.key_attention_options import KeyAttentionOptions
from genssd.distill.train.rollout_options import RolloutOptions
from genssd.distill.train.span_losses import SMALLEST_REST
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.texts.text import Tokenizer

Write = Callable[..., Path]
ROWS = [{"prompt": text[:9], "completion": text[9:40]} for text in (TEXTS[0], TEXTS[2], TEXTS[4])]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """A byte-level student and a teacher in the style of SentencePiece."""
    root = tmp_path_factory.mktemp("spans")
    student = save(root / "student", build("qwen"), seed=1, max_position_embeddings=128)
    teacher = save(root / "teacher", build("gemma", size=700), seed=2, max_position_embeddings=128)
    engine = Engine.from_pretrained(teacher, student, dtype="float32", memory_bytes=1 << 23)
    return TinyPair(teacher=teacher, student=student, engine=engine)


def train(pair: TinyPair, data: Path, output_dir: Path, **changes: Any) -> list[dict[str, Any]]:
    options = {
        "max_steps": 1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "kd_ratio": 1.0,
        "kd_loss": "span_kl", "teacher_model_name_or_path": str(pair.teacher), **changes,
    }  # fmt: skip
    run_train(config_for(pair, data, output_dir, **options))
    return metrics(output_dir)


def spans_of(pair: TinyPair, prompt: str, completion: str) -> list[tuple[float, float]]:
    """Return log p and log q of every span of a completion, by transformers, with the ends of both as the last span."""
    found = []
    for directory in (pair.student, pair.teacher):
        tokenizer = Tokenizer(directory)
        first, ids = tokenizer.encode(prompt, special=True), tokenizer.encode_plain(completion)
        lengths = [len(piece.encode(errors="surrogateescape")) for piece in pieces(directory, ids, completion)]
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        whole = [*first, *ids, tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        values = [float(log_p[len(first) - 1 + i, token]) for i, token in enumerate(whole[len(first) :])]
        found.append((list(accumulate(lengths)), values))
    (own, p), (other, q) = found
    borders = [0, *sorted(set(own) & set(other))]
    spans = [
        (
            sum(v for end, v in zip(own, p, strict=False) if a < end <= b),
            sum(v for end, v in zip(other, q, strict=False) if a < end <= b),
        )
        for a, b in pairwise(borders)
    ]
    return [*spans, (p[-1], q[-1])]


def pieces(directory: Path, ids: list[int], text: str) -> list[str]:
    """Return the text of every token, by the offsets of `tokenizers` (which count characters)."""
    encoding = Tokenizer(directory).hf.backend_tokenizer.encode(text, add_special_tokens=False)
    assert encoding.ids == ids
    raw, found, position = text.encode(), [], 0
    for start, end in encoding.offsets:
        size = len(text[:end].encode()) - position
        # tokens that share a character have its offsets: the last one of them completes it
        shared = [o for o in encoding.offsets if o == (start, end)]
        if len(shared) > 1:
            size = 1 if position + 1 < len(text[:end].encode()) else size
        found.append(raw[position : position + size].decode(errors="surrogateescape"))
        position += size
    assert position == len(raw)
    return found


def test_the_first_loss_is_that_of_the_spans(pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    (logged,) = train(pair, write_rows(ROWS[:1]), tmp_path / "run")
    total = torch.zeros((), dtype=torch.float64)
    spans = spans_of(pair, **ROWS[0])
    for log_p, log_q in spans:
        p, q = torch.tensor(log_p).double().exp(), torch.tensor(log_q).double().exp()
        total += q * (log_q - log_p) + (1 - q) * ((1 - q + SMALLEST_REST) / (1 - p + SMALLEST_REST)).log()
    num_tokens = len(Tokenizer(pair.student).encode_plain(ROWS[0]["completion"])) + 1
    assert 3 < len(spans) < num_tokens
    assert logged["divergence"] == pytest.approx(float(total) / num_tokens, rel=1e-4)


@pytest.mark.parametrize("layout", ["pad", "pack"])
def test_losses_fall(pair: TinyPair, write_rows: Write, tmp_path: Path, layout: str) -> None:
    for loss in ("span_kl", "uld"):
        rows = train(
            pair, write_rows(ROWS), tmp_path / loss, max_steps=8, kd_loss=loss, layout=layout, learning_rate=1e-2,
        )  # fmt: skip
        assert rows[-1]["divergence"] < 0.98 * rows[0]["divergence"]


def test_on_policy(pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    for loss in ("sampled_reverse_kl", "uld"):
        (logged,) = train(
            pair, write_rows(ROWS), tmp_path / loss, kd_loss=loss, lmbda=1.0,
            rollout=RolloutOptions(max_tokens=6, memory_bytes=1 << 20),
        )  # fmt: skip
        assert abs(logged["divergence"]) > 1e-3


def test_rows_of_a_search_have_the_tokens_of_both(pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows([{"prompt": row["prompt"]} for row in ROWS], "problems.jsonl")
    selected = run_select(
        SelectConfig(
            teacher=str(pair.teacher), student=str(pair.student), data=str(data), output_dir=str(tmp_path / "search"),
            candidates=2, chunk=Chunk(tokens=5, until=None), max_tokens=12, dtype="float32",
        ),
        pair.engine,
    ).path  # fmt: skip
    rows = [json.loads(line) for line in selected.read_text().splitlines()]
    student, teacher = Tokenizer(pair.student), Tokenizer(pair.teacher)
    options: dict[str, Any] = {"max_length": 128, "statuses": ("finished", "length"), "teacher": teacher}
    examples = read_examples([selected], student, **options).examples
    for example, row in zip(examples, rows, strict=True):
        assert example.teacher_text is not None
        assert example.teacher_text.ids == tuple(row["teacher_ids"])
        assert example.teacher_text.ends[-1] == example.teacher_text.student_ends[-1]
    train(pair, selected, tmp_path / "run", statuses=("finished", "length"))
    rows[0]["teacher_bytes"].append(1)
    damaged = write_rows(rows, "damaged.jsonl")
    with pytest.raises(InputError, match=r"damaged\.jsonl, line 1: completion_bytes must have \d+ numbers"):
        read_examples([damaged], student, **options)
    # another teacher divides the text anew
    rows[0]["teacher_tokenizer"] = "0" * 16
    again = read_examples([write_rows(rows[:1], "other.jsonl")], student, **options).examples[0]
    assert again.teacher_text is None
    assert again.teacher_prompt_ids == examples[0].teacher_prompt_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kd_loss": "forward_kl"}, "different vocabularies.*span_kl or uld"),
        ({"key_attention": {"weight": 1.0}}, "key_attention compares the two models word by word"),
        ({"kd_topk": 3}, "no kd_topk"),
    ],
)
def test_what_it_refuses(
    pair: TinyPair, write_rows: Write, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    if "key_attention" in changes:
        options = TrainConfig.__dataclass_fields__["key_attention"].default_factory()  # type: ignore[misc]
        changes = {"key_attention": type(options)(**changes["key_attention"])}
    with pytest.raises(InputError, match=message):
        train(pair, write_rows(ROWS), tmp_path / "run", **changes)


def lead_row(pair: TinyPair) -> dict[str, Any]:
    """Return a row of a search whose student's prompt ends in three tokens that the teacher's prompt has anyway."""
    student, teacher, text = pair.engine.tokenizer("student"), pair.engine.tokenizer("teacher"), " and so on"
    ids = teacher.encode_plain(text)
    reading = pair.engine.reader.read(ids, held=b"", begins=True, ends=True)
    return {
        "tokenizer": student.fingerprint, "teacher_tokenizer": teacher.fingerprint, "prompt": "Step 1:",
        "prompt_ids": teacher.encode_plain("Step 1: x"), "lead_tokens": 3, "completion": text, "status": "finished",
        "student_prompt_ids": [*student.encode_plain("Step 1:"), *student.encode_plain("#@%")[:3]],
        "completion_ids": list(reading.ids), "completion_bytes": list(reading.lengths or ()),
        "teacher_ids": ids, "teacher_bytes": list(reading.writer_lengths or ()),
    }  # fmt: skip


def test_on_policy_rows_with_a_lead_are_refused_before_a_model_is_loaded(
    pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher's own prompt has the opening of the thought, which the student would write anew, or not at all."""
    row = lead_row(pair)
    monkeypatch.setattr("genssd.distill.train.build.load_model", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(InputError, match=r"data.jsonl, line 2: the student is trained to write 3 tokens that open or"):
        train(pair, write_rows([ROWS[0], row]), tmp_path / "run", lmbda=0.5)
    monkeypatch.undo()
    assert train(pair, write_rows([ROWS[0], row]), tmp_path / "off", lmbda=0.0)
    assert train(pair, write_rows(ROWS), tmp_path / "on", lmbda=1.0, rollout=RolloutOptions(max_tokens=4))


def test_the_doctor_reads_rows_as_the_training_does(pair: TinyPair, write_rows: Write) -> None:
    """Rows with the tokens of both: the teacher's own, and what is damaged in them."""
    row = lead_row(pair)
    damaged = {**row, "teacher_ids": [1 << 20]}
    data = write_rows([row, damaged])
    options: dict[str, Any] = {
        "model_name_or_path": str(pair.student), "data": (str(data),), "kd_ratio": 1.0, "kd_loss": "span_kl",
        "teacher_model_name_or_path": str(pair.teacher),
    }  # fmt: skip
    inputs = open_for("train", **options)
    with pytest.raises(InputError) as refused:
        read_inputs(dataclasses.replace(TrainConfig(**options), template_date="2026-01-01"))
    assert list(inputs.rows.faults) == [str(refused.value)]
    assert "teacher_ids must be a list of token ids of the teacher's tokenizer" in str(refused.value)
    one_row = {**options, "data": (str(write_rows([row], "one.jsonl")),)}
    read = read_inputs(dataclasses.replace(TrainConfig(**one_row), template_date="2026-01-01"))
    assert open_for("train", **one_row).rows.examples == read.examples
    assert read.examples[0].teacher_prompt_ids == tuple(row["prompt_ids"])


def test_the_doctor_says_what_the_training_refuses(pair: TinyPair, write_rows: Write) -> None:
    data = write_rows([lead_row(pair)])
    options: dict[str, Any] = {
        "model_name_or_path": str(pair.student), "data": (str(data),), "kd_ratio": 1.0, "kd_loss": "span_kl",
        "teacher_model_name_or_path": str(pair.teacher),
    }  # fmt: skip
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "by its bytes"),
        ({"lmbda": 0.5}, "line 1: the student is trained to write 3 tokens"),
        ({"key_attention": KeyAttentionOptions(weight=1.0)}, "key_attention compares the two models word by word"),
    ]
    for changes, line in cases:
        (found,) = check_tokenizers(open_for("train", **{**options, **changes}))
        assert (found.level, line in found.line) == ("error" if changes else "ok", True), found.line
        if changes:
            with pytest.raises(InputError, match=re.escape(line)):
                read_inputs(dataclasses.replace(TrainConfig(**{**options, **changes}), template_date="2026-01-01"))


def test_a_completion_that_is_too_long_for_the_teacher(pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": TEXTS[0][:60]}]
    letters = save(tmp_path / "letters", build("gemma", size=60), seed=2, max_position_embeddings=48)
    data = write_rows(rows)
    with pytest.raises(CapacityError, match=r", line 1: \d+ tokens for the teacher, which has 48 positions") as refused:
        train(pair, data, tmp_path / "run", teacher_model_name_or_path=str(letters))
    inputs = open_for(
        "train", model_name_or_path=str(pair.student), data=(str(data),), kd_ratio=1.0, kd_loss="span_kl",
        teacher_model_name_or_path=str(letters),
    )  # fmt: skip
    assert list(inputs.rows.faults) == [str(refused.value)]
