"""Options of the rendering of chats: which commands have them, how they are read, and what a run records."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.templates import TRIMMED_DATE
from support.tiny_pair import TinyPair

from genssd import Engine
from genssd.configs import CONFIGS
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import run_evaluate
from genssd.distill.runs import chat_settings
from genssd.distill.runs.chat_settings import ChatSettings, parse_date, parse_template_kwargs
from genssd.distill.runs.effects import check_effects
from genssd.distill.score.config import ScoreConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError
from genssd.flags import flags_of_file

Write = Callable[..., Path]
TEMPLATE = TRIMMED_DATE.replace(
    "assistant\\n' -}}{%- endif", "assistant\\n' + ('' if enable_thinking is defined else 'thinking: ') -}}{%- endif"
)


def test_every_command_that_renders_chats_has_the_options() -> None:
    without = {name for name, config in CONFIGS.items() if not issubclass(config, ChatSettings)}
    # the doctor takes those of the command after it
    assert without == {"demo", "report", "reproduce", "reselect", "export", "tune", "doctor", "env"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), {}),
        (("enable_thinking=false",), {"enable_thinking": False}),
        (("enable_thinking=False", "n=3", "effort=low"), {"enable_thinking": False, "n": 3, "effort": "low"}),
        (('{"a": {"b": [1, null]}}', "c="), {"a": {"b": [1, None]}, "c": ""}),
        (("text=a=b", 'quoted="3"'), {"text": "a=b", "quoted": "3"}),
    ],
)
def test_variables_are_read(words: tuple[str, ...], expected: dict[str, Any]) -> None:
    assert parse_template_kwargs(words) == expected


@pytest.mark.parametrize("word", ["enable_thinking", "{not json}", "two words=1", "=1"])
def test_other_words_are_refused(word: str) -> None:
    with pytest.raises(InputError, match=r"^chat_template_kwargs: "):
        parse_template_kwargs((word,))


def test_a_date_is_read() -> None:
    assert parse_date("2026-11-26") == datetime.date(2026, 11, 26)
    with pytest.raises(InputError, match="template_date must be a date such as 2026-11-26, not 'today'"):
        parse_date("today")


def test_variables_may_be_an_object_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("chat_template_kwargs: {enable_thinking: false}\n")
    assert flags_of_file(path, GenerateConfig, "generate") == ["--chat_template_kwargs", '{"enable_thinking": false}']


def test_variables_of_one_model_are_told_apart() -> None:
    config = GenerateConfig(
        teacher="t", student="s", data="d", chat_template_kwargs=("a=1",), teacher_template_kwargs=("a=2", "b=3"),
        student_template_kwargs=("c=4",),
    )  # fmt: skip
    options = config.make_chat_options("2026-11-26")
    assert options.for_model("teacher").template_kwargs == {"a": 2, "b": 3}
    assert options.for_model("student").template_kwargs == {"a": 1, "c": 4}
    assert config.as_student_settings()["chat_template_kwargs"] == ("a=1", "c=4")
    with pytest.raises(InputError, match=r"student_template_kwargs=.* has no effect: it needs a student"):
        check_effects(dataclasses.replace(config, student=None))
    scoring = ScoreConfig(student="s", data=("d",), teacher_template_kwargs=("a=1",))
    with pytest.raises(InputError, match=r"teacher_template_kwargs=.* has no effect: it needs a teacher"):
        check_effects(scoring)


@pytest.fixture
def dated(tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A student whose chat template prints the date, on 26 November 2026."""
    student = tmp_path / "student"
    shutil.copytree(tiny_pair.student, student)
    (student / "chat_template.jinja").write_text(TEMPLATE)
    set_clock(monkeypatch, datetime.date(2026, 11, 26))
    return student


def set_clock(monkeypatch: pytest.MonkeyPatch, day: datetime.date) -> None:
    monkeypatch.setattr(chat_settings, "read_clock", lambda: day)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_keeps_the_date_of_its_begin(
    dated: Path, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.from_pretrained(dated, memory_bytes=1 << 24)
    config = GenerateConfig(
        teacher=str(dated),
        data=str(write_rows([{"question": "1+1?"}])),
        output_dir=str(tmp_path / "run"),
        max_tokens=4,
        system_prompt="Be brief.",
        chat_template_kwargs=("enable_thinking=false",),
    )
    run_generate(config, engine)
    set_clock(monkeypatch, datetime.date(2026, 11, 27))
    write_rows([{"question": "1+1?"}, {"question": "1+1?"}])
    path = run_generate(dataclasses.replace(config, resume=True), engine).path
    first, second = read_rows(path)
    expected = (
        "<|im_start|>system\nToday Date: 26 Nov 2026\n\nBe brief.<|im_end|>"
        "<|im_start|>user\n1+1?<|im_end|><|im_start|>assistant\n"
    )
    assert engine.tokenizer("teacher").hf.decode(first["prompt_ids"]) == expected
    assert first["prompt_ids"] == second["prompt_ids"] == first["student_prompt_ids"]
    assert first["messages"][:2] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recorded["template_date"] == "2026-11-26"
    for change in ({"chat_template_kwargs": ()}, {"system_prompt": None}, {"template_date": "2026-11-27"}):
        with pytest.raises(InputError, match=f"begun with {next(iter(change))}="):
            run_generate(dataclasses.replace(config, resume=True, **change), engine)  # type: ignore[arg-type]
    another = dataclasses.replace(config, output_dir=str(tmp_path / "other"))
    (row, _) = read_rows(run_generate(another, engine).path)
    assert "Today Date: 27 Nov 2026" in engine.tokenizer("teacher").hf.decode(row["prompt_ids"])
    # the engine that was passed in keeps its own options
    assert "thinking: " in engine.tokenizer("teacher").chat.render([{"role": "user", "content": "q"}])


def test_options_are_checked_before_anything_is_written(
    dated: Path, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.from_pretrained(student=dated, memory_bytes=1 << 24)
    config = EvaluateConfig(
        model=str(dated),
        data=str(write_rows([{"question": "1+1?", "answer": "2"}])),
        output_dir=str(tmp_path / "run"),
        max_tokens=4,
        chat_template_kwargs=("thinking=false",),
    )
    with pytest.raises(InputError, match=r"does not read thinking; it reads: date_string, enable_thinking$"):
        run_evaluate(config, engine)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "from_pretrained", None)
        with pytest.raises(InputError, match="does not read thinking"):  # before weights are loaded
            run_evaluate(config)
    with pytest.raises(InputError, match="template_date must be a date"):
        run_evaluate(dataclasses.replace(config, template_date="soon"), engine)
    raw = write_rows([{"prompt": "1+1=", "answer": "2"}], "raw.jsonl")
    with pytest.raises(InputError, match=r"raw\.jsonl, line 1: the prompt is text, to which no system prompt can be"):
        run_evaluate(dataclasses.replace(config, data=str(raw), chat_template_kwargs=(), system_prompt="s"), engine)
    assert not (tmp_path / "run" / "run.json").exists()
    run_evaluate(dataclasses.replace(config, chat_template_kwargs=(), template_date="2001-02-03"), engine)
    (row,) = read_rows(tmp_path / "run" / "evaluation.jsonl")
    assert "Today Date: 03 Feb 2001\n" in engine.tokenizer("student").hf.decode(row["prompt_ids"])


def test_a_training_keeps_the_date_of_its_begin(
    dated: Path, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = write_rows([{"question": "1 + 1 ?", "response": "2"}], "held.jsonl")
    config = TrainConfig(
        model_name_or_path=str(dated),
        data=(str(write_rows([{"question": "1+1?", "response": "2"}, {"question": "2+2?", "response": "4"}])),),
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=1,
        num_train_epochs=2,
        save_steps=1,
        eval_data=(str(held_out),),
        chat_template_kwargs=("enable_thinking=false",),
    )
    with pytest.raises(InputError, match=r"of 1 of 2 rows .* 0 exactly and 1 with .*\n .*data\.jsonl, line 1 = .*held"):
        run_train(config)
    config = dataclasses.replace(config, allow_eval_overlap=True)
    assert run_train(config).eval_overlap == {"rows": 2, "exact": 0, "near": 1}
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["settings"]["template_date"] == "2026-11-26"
    set_clock(monkeypatch, datetime.date(2026, 11, 27))
    resumed = dataclasses.replace(config, resume_from_checkpoint="last")
    run_train(resumed)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["template_date"] == "2026-11-26"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval_overlap"] == {"rows": 2, "exact": 0, "near": 1}
    with pytest.raises(InputError, match="was trained with template_date='2026-11-26', not '2026-11-27'"):
        run_train(dataclasses.replace(resumed, template_date="2026-11-27"))
