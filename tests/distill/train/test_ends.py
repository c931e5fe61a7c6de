"""A Base student beside an Instruct teacher: other end tokens, which the student learns to stop at."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_pair import TinyPair
from support.toys import EOS, edit_json, save_checkpoint

from genssd import Chunk, Engine
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train
from genssd.engine.text import Tokenizer

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
