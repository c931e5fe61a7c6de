"""A Base student beside an Instruct teacher: other end tokens, which the student learns to stop at."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_pair import TinyPair
from support.tokenizer_families import EMBEDDING_ROWS, QWEN25, build_backend, save_backend, save_r1_qwen
from support.toys import EOS, edit_json, save_checkpoint, save_model

from genssd import Chunk, Engine
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import CheckpointError, InputError
from genssd.engine.readers.ends import describe_foreign_ends, find_foreign_ends
from genssd.engine.readers.token_map import match_tokenizers
from genssd.engine.texts.text import Tokenizer

Write = Callable[..., Path]
START = 258
"""Id of the token `<|im_start|>`, which ends the responses of the Base student here."""


@pytest.fixture
def base_student(tmp_path: Path) -> Path:
    """A checkpoint with the teacher's tokenizer that ends with another one of its tokens."""
    directory = tmp_path / "base"
    save_checkpoint(directory, "llama", seed=3, eos_token_id=START)
    edit_json(directory / "tokenizer_config.json", eos_token="<|im_start|>")
    edit_json(directory / "generation_config.json", eos_token_id=START)
    assert Tokenizer(directory).end_token_ids == {START}
    return directory


def test_a_search_names_the_end_that_the_student_does_not_stop_at(
    tiny_pair: TinyPair, base_student: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="genssd")
    engine = Engine.from_pretrained(tiny_pair.teacher, base_student, memory_bytes=1 << 24)
    (line,) = [r.message for r in caplog.records if "responses of the teacher" in r.message]
    assert f"end with '<|im_end|>' (id {EOS}), where the student" in line
    assert f"it ends with '<|im_start|>' (id {START})" in line
    (selection,) = engine.select_expand(["a"], candidates=2, chunk=Chunk(tokens=2, until=None), max_tokens=4)
    assert selection.error is None
    caplog.clear()
    Engine.from_pretrained(tiny_pair.teacher, tiny_pair.student, memory_bytes=1 << 24)
    assert not [r for r in caplog.records if "responses of the teacher" in r.message]


@pytest.mark.parametrize("on_policy", [False, True])
def test_the_trained_student_lists_the_end_that_it_has_learnt(
    tiny_pair: TinyPair,
    base_student: Path,
    write_rows: Write,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    on_policy: bool,
) -> None:
    own = {"tokenizer": Tokenizer(base_student).fingerprint, "student_prompt_ids": [1, 2, 3]}
    rows: list[dict[str, Any]] = [
        {**own, "completion_ids": [4, 5, EOS], "status": "finished"},
        {**own, "completion_ids": [4, 5, 6], "status": "length"},
    ]
    options: dict[str, Any] = {"statuses": ("finished", "length"), "max_steps": 1, "save_steps": 1}
    if on_policy:
        options |= {"lmbda": 1.0, "kd_ratio": 1.0, "teacher_model_name_or_path": str(tiny_pair.teacher)}
    caplog.set_level(logging.WARNING, logger="genssd.train")
    run_train(
        TrainConfig(
            data=(str(write_rows(rows)),),
            model_name_or_path=str(base_student),
            output_dir=str(tmp_path / "run"),
            **options,
        )
    )
    (line,) = [r.message for r in caplog.records if "completions end with" in r.message]
    assert f"'<|im_end|>' (id {EOS}), and the student with '<|im_start|>' (id {START})" in line
    for directory in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        generation = json.loads((directory / "generation_config.json").read_text())
        assert generation["eos_token_id"] == [START, EOS]
        assert Tokenizer(directory).end_token_ids == {START, EOS}


def test_a_student_with_the_same_end_keeps_its_own(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    own = {"tokenizer": Tokenizer(tiny_pair.student).fingerprint, "student_prompt_ids": [1, 2, 3]}
    rows = [{**own, "completion_ids": [4, 5, EOS]}, {"prompt": "a", "completion": "b"}]
    before = json.loads((tiny_pair.student / "generation_config.json").read_text())["eos_token_id"]
    run_train(
        TrainConfig(
            data=(str(write_rows(rows)),),
            model_name_or_path=str(tiny_pair.student),
            output_dir=str(tmp_path / "run"),
            max_steps=1,
        )
    )
    assert json.loads((tmp_path / "run" / "generation_config.json").read_text())["eos_token_id"] == before


def test_ends_that_no_model_has_are_refused(tiny_pair: TinyPair, base_student: Path, tmp_path: Path) -> None:
    edit_json(base_student / "tokenizer_config.json", eos_token=None)
    edit_json(base_student / "generation_config.json", eos_token_id=99_999)
    message = r"base: no response could end, because eos_token_id \(99999\) is no id of the model, which has 259"
    for pair in ((tiny_pair.teacher, base_student), (base_student, tiny_pair.student)):
        with pytest.raises(CheckpointError, match=message):
            Engine.from_pretrained(*pair, memory_bytes=1 << 24)
    # an id beside others is no fault, and is not named
    edit_json(base_student / "generation_config.json", eos_token_id=[START, 99_999])
    tokenizers = Tokenizer(tiny_pair.teacher), Tokenizer(base_student)
    token_map = match_tokenizers(*tokenizers, "teacher", "student")
    assert find_foreign_ends(*tokenizers, token_map) == [EOS]
    assert "it ends with '<|im_start|>' (id 258). A" in describe_foreign_ends([EOS], *tokenizers)
    assert find_foreign_ends(*reversed(tokenizers), token_map) == [START]  # type: ignore[arg-type]


def test_an_end_that_the_student_cannot_read_is_refused(tmp_path: Path) -> None:
    """The teacher has an end of its own, and the student no end at all."""
    teacher, student = save_r1_qwen(tmp_path / "teacher"), tmp_path / "student"
    save_backend(student, build_backend(QWEN25), "<|im_end|>")
    save_model(student, "llama", vocab_size=EMBEDDING_ROWS, eos_token_id=None)  # whose tokenizer class has no end
    edit_json(student / "tokenizer_config.json", eos_token=None)
    with pytest.raises(InputError, match=r"end with '.*' \(id 263\), and the student .* has neither this token nor an"):
        Engine.from_pretrained(teacher, student, memory_bytes=1 << 24)
