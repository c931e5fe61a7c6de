"""A teacher whose prompt opens the thought and a student whose prompt does not: from the search to what is trained."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.templates import DEEPSEEK_V31, SMOLLM3, THINK_OPENER, TRIMMED_DATE
from support.tiny_pair import TinyPair

from genssd import Chunk, Engine
from genssd.cli import main
from genssd.distill.data.example_files import read_examples
from genssd.distill.data.traces import Trace, make_training_row, read_traces
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.reselect import run_reselect
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.row_topk import read_topk
from genssd.engine.common.errors import InputError
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Tokenizer

Write = Callable[..., Path]
ROWS = [{"question": "1+1?", "answer": "2"}, {"prompt": "1+1=", "answer": "2"}]
LEAD = "<think>\n"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A teacher and a student with chat templates of their own."""

    teacher: Path
    student: Path
    engine: Engine

    def config(self, data: Path, output_dir: Path, **changes: Any) -> SelectConfig:
        options: dict[str, Any] = {"candidates": 2, "beam": 2, "max_tokens": 8, "chunk": Chunk(tokens=4, until=None)}
        models = {"teacher": str(self.teacher), "student": str(self.student)}
        return SelectConfig(**{**options, **models, **changes}, data=str(data), output_dir=str(output_dir))


def make_pair(tiny: TinyPair, directory: Path, teacher: str, student: str) -> Pair:
    paths = {}
    for name, template in (("teacher", teacher), ("student", student)):
        paths[name] = directory / name
        shutil.copytree(getattr(tiny, name), paths[name])
        (paths[name] / "chat_template.jinja").write_text(template)
    return Pair(**paths, engine=Engine.from_pretrained(**paths, memory_bytes=1 << 24))


@pytest.fixture(scope="module")
def opened(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tiny_pair, tmp_path_factory.mktemp("opened"), THINK_OPENER, SMOLLM3)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def render(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The oracle: a later chat with the student, rendered and encoded by transformers."""
    text = tokenizer.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.hf.encode(text, add_special_tokens=False))


def test_rows_train_the_opening_after_the_students_own_prompt(opened: Pair, write_rows: Write, tmp_path: Path) -> None:
    config = opened.config(write_rows(ROWS), tmp_path / "run", teacher_topk=3)
    path = run_select(config, opened.engine).path
    tokenizer = opened.engine.tokenizer("student")
    chat, raw = sorted(read_rows(path), key=lambda row: row["index"])
    own = render(tokenizer, chat["messages"][:-1])
    assert chat["student_prompt_ids"] == [*own, *tokenizer.encode(LEAD, special=False)]
    assert chat["lead_tokens"] == len(LEAD)
    for text in (chat["messages"][-1]["content"], chat["completion"][0]["content"], chat["others"][0]["completion"]):
        assert text.startswith(LEAD)
    assert raw["lead_tokens"] == 0
    assert not raw["completion"].startswith(LEAD)
    # the student's statistics are those after the opening, as scored by the engine
    decision = next(row for row in read_rows(path.parent / "decisions.jsonl") if row["index"] == 0)
    first = decision["candidates"][0]
    (stats,) = opened.engine.score([chat["student_prompt_ids"]], [first["token_ids"]])
    torch.testing.assert_close(stats.logprob, torch.tensor(first["student"]["logprob"]), atol=1e-5, rtol=1e-5)
    # what is trained begins where a later chat ends, and the teacher reads it after its own prompt
    data = read_examples([path], tokenizer, max_length=512, statuses=("finished", "length"))
    example = max(data.examples, key=lambda e: e.num_prompt)  # not the raw prompt
    assert list(example.input_ids[: example.num_prompt]) == own
    assert list(example.completion_ids) == [*tokenizer.encode(LEAD, special=False), *chat["completion_ids"]]
    assert [*example.teacher_prompt_ids, *example.completion_ids] == [*chat["prompt_ids"], *chat["completion_ids"]]
    top = read_topk([example])
    assert len(top.ids) == example.num_completion == len(example.token_weights())
    assert bool((top.ids[: len(LEAD)] == -1).all())
    assert bool((top.ids[len(LEAD) :] >= 0).all())


def test_rows_written_from_such_rows_keep_the_opening(opened: Pair, write_rows: Write, tmp_path: Path) -> None:
    path = run_select(opened.config(write_rows(ROWS[:1]), tmp_path / "run"), opened.engine).path
    tokenizer = opened.engine.tokenizer("student")
    (row,) = read_rows(path)
    best, *_ = (t for t in read_traces([path], tokenizer, max_length=512) if isinstance(t, Trace))
    assert list(best.prompt_ids) == row["student_prompt_ids"]  # scored as in the search
    written = make_training_row(best, best.response_ids, tokenizer)
    assert (written["lead_tokens"], written["messages"]) == (row["lead_tokens"], row["messages"])
    # a student with another template gets the whole thought from the text
    other = tmp_path / "other"
    shutil.copytree(opened.student, other)
    (other / "chat_template.jinja").write_text(TRIMMED_DATE)
    reader = Tokenizer(other)
    (pairs,) = {run_reselect(ReselectConfig(run=str(path.parent), output_dir=str(tmp_path / "re"))).output_dir}
    for pair in read_rows(Path(pairs) / "pairs.jsonl"):
        assert pair["response_so_far"].startswith(LEAD)
        (chosen, _) = read_examples(
            [write_rows([{**pair, "tokenizer": "another"}], "pair.jsonl")], reader, max_length=512, statuses=()
        ).examples
        prompt = reader.hf.decode(list(chosen.input_ids[: chosen.num_prompt]))
        assert prompt.startswith(reader.hf.decode(render(reader, pair["problem_prompt"])) + LEAD)


def test_generate_writes_the_whole_thought(opened: Pair, write_rows: Write, tmp_path: Path) -> None:
    for student in (None, str(opened.student)):
        config = GenerateConfig(
            teacher=str(opened.teacher), student=student, data=str(write_rows(ROWS[:1])), max_tokens=4,
            output_dir=str(tmp_path / str(student is None)),
        )  # fmt: skip
        (row,) = read_rows(run_generate(config, opened.engine).path)
        assert row["messages"][-1]["content"].startswith(LEAD)
        assert row["lead_tokens"] == (0 if student is None else len(LEAD))


@pytest.mark.parametrize("value", [-1, 1.5, True, "7", 10_000])
def test_a_wrong_number_of_lead_tokens_is_refused(opened: Pair, write_rows: Write, value: object) -> None:
    tokenizer = opened.engine.tokenizer("student")
    row = {
        "tokenizer": tokenizer.fingerprint,
        "student_prompt_ids": [1, 2],
        "completion_ids": [3],
        "lead_tokens": value,
    }
    with pytest.raises(InputError, match="line 1: lead_tokens must be a number of tokens of student_prompt_ids"):
        read_examples([write_rows([row])], tokenizer, max_length=9, statuses=())


def test_a_line_says_what_the_templates_do(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = make_pair(tiny_pair, tmp_path, SMOLLM3, DEEPSEEK_V31)
    caplog.set_level(logging.INFO, logger="genssd.select")
    data = write_rows(ROWS)
    refused = pair.config(data, tmp_path / "refused")
    summary = run_select(refused, pair.engine)  # the raw prompt is run, the chat is no one thought
    assert (summary.prompts, len(summary.bad_rows)) == (1, 1)
    assert "student_template_kwargs thinking=true" in summary.bad_rows[0]
    caplog.clear()
    run_select(pair.config(data, tmp_path / "on", student_template_kwargs=("thinking=true",)), pair.engine)
    (line,) = [r for r in caplog.records if r.message.startswith("thinking: ")]
    assert line.levelno == logging.WARNING
    assert "has the switch enable_thinking, on by default" in line.message
    assert "has the switch thinking, on, opens a thought (<think>) in the prompt and" in line.message
    assert "student_template_kwargs thinking=..." in line.message
    caplog.clear()
    run_select(tiny_config(tiny_pair, data, tmp_path / "plain"), tiny_pair.engine)
    assert not [r for r in caplog.records if r.message.startswith("thinking: ")]


def tiny_config(tiny: TinyPair, data: Path, output_dir: Path) -> SelectConfig:
    return Pair(tiny.teacher, tiny.student, tiny.engine).config(data, output_dir)


def test_variables_are_set_for_each_model_alone(opened: Pair, write_rows: Write, tmp_path: Path) -> None:
    kwargs = {"enable_thinking": False}
    own = opened.engine.with_chat(ChatOptions(student_template_kwargs=kwargs))
    assert not own.tokenizer("teacher").chat.options.template_kwargs
    assert own.tokenizer("student").chat.options.template_kwargs == kwargs
    both = ChatOptions(template_kwargs={"a": 1, "b": 1}, teacher_template_kwargs={"b": 2})
    assert both.for_model("teacher").template_kwargs == {"a": 1, "b": 2}
    assert both.for_model("student").template_kwargs == {"a": 1, "b": 1}
    config = opened.config(write_rows(ROWS), tmp_path / "run")
    for changes, message in (
        ({"teacher_template_kwargs": ("enable_thinking=false",)}, "^teacher_template_kwargs: .*teacher does not read "
         "enable_thinking; it reads: none"),
        ({"student_template_kwargs": ("thinking=false",)}, "^student_template_kwargs: .*student does not read "
         "thinking; it reads: enable_thinking"),
        ({"chat_template_kwargs": ("think=false",)}, "^chat_template_kwargs: .* does not read think; .*set a "
         "variable of one model alone"),
        ({"student_template_kwargs": ("thinking",)}, "^student_template_kwargs: 'thinking' must be name=value"),
    ):  # fmt: skip
        for engine in (opened.engine, None):  # without an engine before any weights are loaded
            with pytest.raises(InputError, match=message):
                run_select(dataclasses.replace(config, **changes), engine)  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_budget_that_ends_before_any_prompt_says_that_nothing_was_written(
    opened: Pair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    yaml = tmp_path / "config.yaml"
    yaml.write_text("student_template_kwargs: {enable_thinking: true}\ntotal_budget: {tokens: 1}\n")
    main(["select", "--config", str(yaml), "--teacher", str(opened.teacher), "--student", str(opened.student),
          "--data", str(write_rows(ROWS)), "--output-dir", str(tmp_path / "run"), "--max-tokens", "8",
          "--memory-bytes", str(1 << 24)])  # fmt: skip
    printed = capsys.readouterr()
    assert f"nothing was written to {tmp_path / 'run' / 'selections.jsonl'}" in printed.out
    assert "total_budget.tokens=1 ended the search: 0 prompts finished, 2 unfinished" in printed.out
    assert "none was run" not in printed.out
    assert not read_rows(tmp_path / "run" / "selections.jsonl")
