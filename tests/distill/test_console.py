"""Progress: estimates from an engine's counts, the lines that show them, and that lines come while a command works."""

from __future__ import annotations

import io
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.progress import Recorder
from support.tiny_pair import TinyPair

from genssd.distill import console as consoles
from genssd.distill.console import ProgressLine, describe, report_training
from genssd.distill.runs.progress import Progress, Stage, measure
from genssd.distill.score.config import ScoreConfig
from genssd.distill.score.run import run_score
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.train.trainer import TrainProgress
from genssd.engine.common.amounts import format_bytes, format_count, format_part
from genssd.engine.common.usage import CacheUse, Usage

PAGES = CacheUse(held_pages=1234, pages=4096, held_bytes=1536 << 20, bytes=5 << 30)


@dataclass
class CountedEngine:
    """The counts of an engine, set by hand."""

    usage: Usage = field(default_factory=Usage)
    cache_use: CacheUse = PAGES


class Keeper(Progress):
    """Keeps the stage that has begun."""

    stage: Stage

    def show(self, stage: Stage) -> None:
        self.stage = stage


def begin(engine: CountedEngine, **values: Any) -> Stage:
    """Begin a stage at second 100."""
    keeper = Keeper()
    keeper.begin("", engine=engine, **values)  # type: ignore[arg-type]
    keeper.stage.started = 100.0
    return keeper.stage


def line_of(stage: Stage, now: float) -> str:
    return describe("select", stage, measure(stage, now))


def test_a_search_is_shown_token_by_token_and_its_end_is_estimated() -> None:
    engine = CountedEngine()
    usage = engine.usage
    usage.plan([100] * 3)
    usage.finish(100, 100)
    usage.sampled_tokens = usage.computed_tokens = 100  # an earlier call on the same engine
    stage = begin(engine, unit="prompts", total=12, done=2, work="writing")
    pages = "1,234/4,096 pages (1.5 of 5 GiB)"
    assert line_of(stage, 105.0) == f"select: 2/12 prompts, 0 tokens of prompts read, {pages}, 5 s so far"
    usage.computed_tokens += 500
    assert line_of(stage, 105.0) == (
        f"select: 2/12 prompts, 500 tokens of prompts read, 100 tokens/s, {pages}, 5 s so far"
    )
    usage.plan([400] * 10)
    usage.sampled_tokens += 1000
    # 3000 tokens are left at most, which take 30 seconds at this rate
    assert line_of(stage, 110.0) == (
        f"select: 2/12 prompts, 1000 of at most 4000 tokens, 100 tokens/s, {pages}, at most 30 s left"
    )
    stage.done = 7
    for _ in range(5):
        usage.finish(400, 200)
    # five prompts of 200 tokens: five more are expected to take as many
    assert line_of(stage, 110.0) == (
        f"select: 7/12 prompts, 1000 of about 2000 tokens, 100 tokens/s, {pages}, 10 s left"
    )
    # tokens of prompts that are still being written count for the mean: 2000 of five ended prompts, 400 each
    usage.sampled_tokens += 1000
    assert measure(stage, 120.0).tokens_left == 1000, "never more than the prompts may take"
    for _ in range(5):
        usage.finish(400, 200)
    assert measure(stage, 120.0).tokens_left == 0


def test_what_is_read_and_what_has_no_tokens() -> None:
    engine = CountedEngine(cache_use=CacheUse(held_pages=0, pages=8, held_bytes=0, bytes=8192))
    stage = begin(engine, unit="traces", total=4, work="reading", to_read=20_000)
    engine.usage.computed_tokens = 5000
    assert line_of(stage, 110.0) == (
        "select: 0/4 traces, 5000 of at most 20.0k tokens read, 500 tokens/s, 0/8 pages (0 of 8 KiB), at most 30 s left"
    )
    stage.done = 2
    assert line_of(stage, 200.0).endswith("8 KiB), 1:40 left"), "finished traces tell it better"
    loading = Stage(name="loading teacher A", started=100.0)
    assert line_of(loading, 103.0) == "select, loading teacher A: 3 s so far"
    judging = begin(engine, unit="traces", total=4)
    engine.usage.sampled_tokens += 123_456
    assert ", 123k tokens written, 12346 tokens/s" not in line_of(judging, 110.0)
    assert ", 123k tokens written, 12.3k tokens/s" in line_of(judging, 110.0)
    assert line_of(Stage(name="", unit="traces", total=8, done=5, done_before=1, started=0.0), 7200.0) == (
        "select: 5/8 traces, 1:30:00 left"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 KiB"), (1536, "1.5 KiB"), (300 << 20, "300 MiB"), (5 << 40, "5 TiB"),
     ((285 << 20) + (1 << 19), "286 MiB"), (1 << 50, "1024 TiB"), (1010 << 20, "1 GiB")],
)  # fmt: skip
def test_bytes_in_a_unit_that_reads_well(count: int, text: str) -> None:
    assert format_bytes(count) == text
    assert format_part(0, count) == f"0 of {text}"


def test_a_stage_keeps_no_engine_in_memory() -> None:
    engine = CountedEngine()
    stage = begin(engine, unit="prompts", total=4, work="writing")
    del engine
    assert line_of(stage, 101.0) == "select: 0/4 prompts, 1 s so far"


def test_parts_and_trainings() -> None:
    recorder = Recorder()
    part = recorder.within("round 2, train")
    report = report_training(part)
    progress = TrainProgress(
        step=3, fraction_done=0.25, epoch=0.5, loss=1.25, cross_entropy=1.25, divergence=None, attention=None,
        learning_rate=1e-4, tokens=1000, tokens_per_second=1234.0,
    )  # fmt: skip
    report(progress)
    report(progress)
    part.note("2 rows left out")
    assert recorder.stages == ["round 2, train, reading the data and loading the model", "round 2, train"]
    assert recorder.counts == [(25.0, 100)] * 2
    assert recorder.notes == ["2 rows left out"]
    stage = Stage(name="", unit="%", total=100, done=25.0, detail="step 3, loss 1.2500", started=0.0)
    assert line_of(stage, 30.0) == "select: 25 %, step 3, loss 1.2500, 90 s left"


def test_plain_lines_come_while_the_models_work(
    tiny_pair: TinyPair, write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All prompts end together, and there are lines before that."""
    monkeypatch.setattr(consoles, "FIRST_PLAIN", 0.0)
    monkeypatch.setattr(consoles, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr(consoles, "TICK", 0.005)
    data = write_rows([{"prompt": f"{i}+3="} for i in range(4)])
    config = GenerateConfig(
        teacher=str(tiny_pair.teacher), data=str(data), output_dir=str(tmp_path / "run"), max_tokens=60,
        memory_bytes=1 << 22,
    )  # fmt: skip
    text = io.StringIO()
    with ProgressLine("generate", Console(file=text, width=40)) as line:
        run_generate(config, report=line)
    shown = text.getvalue().splitlines()
    assert f"generate: 4 problems read from {data}" in shown
    assert any(
        re.fullmatch(rf"generate: teacher {tiny_pair.teacher} loaded in .* s; the caches hold .*", s) for s in shown
    )
    running = [s for s in shown if s.startswith("generate: 0/4 prompts, ") and "of at most 240 tokens" in s]
    assert len(running) > 1, "several lines before the first prompt has ended"
    assert all(re.search(r"\d tokens/s, \d+/\d+ pages \(.* of 4 MiB\), at most \d+ s left$", s) for s in running)
    assert len(set(running)) > 1


def test_short_commands_print_no_progress(
    tiny_pair: TinyPair, write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consoles, "FIRST_PLAIN", 1e9)
    data = write_rows([{"prompt": "a", "completion": "b"}])
    text = io.StringIO()
    with ProgressLine("score", Console(file=text)) as line:
        config = ScoreConfig(student=str(tiny_pair.student), data=(str(data),), output_dir=str(tmp_path / "run"))
        run_score(config, tiny_pair.engine, line)
    assert text.getvalue() == ""


def test_a_terminal_has_a_live_line_and_notes_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "FIRST_PLAIN", 0.0)
    monkeypatch.setattr(consoles, "TICK", 0.005)
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with ProgressLine("select", console) as line:
        line.note("4 problems read from x.jsonl")
        line.begin("loading teacher A")
        assert line._live is not None
        line._live.refresh()
        line.begin("", unit="prompts", total=4)
        line(2, 4)
        line._live.refresh()
        with line.paused():
            assert line._live is None
        assert line._live is not None
        while line._notes:
            time.sleep(0.01)
    shown = text.getvalue()
    assert "select: 4 problems read from x.jsonl" in shown
    assert "select, loading teacher A: 0 s so far" in shown
    assert "select: 2/4 prompts, 0 s left" in shown


def test_a_full_disk_under_stderr_ends_the_lines_and_not_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consoles, "FIRST_PLAIN", 0.0)
    monkeypatch.setattr(consoles, "TICK", 0.005)

    class FullDisk(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with ProgressLine("select", Console(file=FullDisk())) as line:
        line.note("read")
        line._printer.join(10.0)
        assert not line._printer.is_alive()
        line(1, 2)


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "row", "0 rows"), (1, "row", "1 row"), (2, "prompt token", "2 prompt tokens"), (1, "reply", "1 reply"),
        (2000, "reply", "2,000 replies"), (3, "prefix", "3 prefixes"), (2, "process", "2 processes"),
        (2, "key", "2 keys"),
    ],
)  # fmt: skip
def test_counts_have_their_plural(number: int, noun: str, text: str) -> None:
    assert format_count(number, noun) == text
