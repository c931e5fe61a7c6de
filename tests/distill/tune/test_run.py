"""`genssd tune` without a GPU: what it refuses, and what it writes of results that are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair

from genssd.cli import main
from genssd.distill.tune import run as tuning
from genssd.distill.tune.config import TuneConfig
from genssd.distill.tune.run import run_tune
from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.kernels import tune_file
from genssd.kernels.tune_file import Card, Entry, Problem

CARD = Card(name="card", capability="sm_90", versions=("1", "2", "3"))
ENTRY = Entry(deterministic=None, fastest=({"block": 1},) * 4, microseconds=(1.0,) * 4)


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """A CUDA device whose kernels take no time; the list receives what was tuned for."""
    seen: list[Any] = []

    def tune_models(
        models: Sequence[tuple[torch.dtype, ModelConfig]],
        device: torch.device,
        *,
        teacher: tuple[torch.dtype, ModelConfig] | None,
        seconds: float,
        report: Callable[[str], None],
    ) -> dict[Problem, Entry]:
        seen.append((models, teacher, device, seconds))
        report("score: 1 us")
        return {
            Problem(operator="score", dtype="float32", shape=(m.vocab_size, m.hidden_size)): ENTRY
            for _, m in [*models, *([] if teacher is None else [teacher])]
        }

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning, "tune_models", tune_models)
    monkeypatch.setattr(tuning, "card_of", lambda device: CARD)
    monkeypatch.setenv("GENSSD_TUNE_FILE", str(tmp_path / "default.json"))
    return seen


def test_without_a_gpu_it_ends_with_one_line(
    tiny_pair: TinyPair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit:
        main(["tune", "--student", str(tiny_pair.student)])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "genssd: tune times kernels on a CUDA device, and torch finds none\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "tune needs --model-name-or-path, --teacher or --student"),
        ({"student": "x", "seconds": 0.0}, "seconds must be above 0"),
        ({"student": "x", "device": "cpu"}, "not on cpu"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, with_cuda: list[Any]) -> None:
    with pytest.raises(InputError, match=message):
        run_tune(TuneConfig(**options))


def test_results_are_added_to_the_file(
    tiny_pair: TinyPair, with_cuda: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.json"
    main(["tune", "--teacher", str(tiny_pair.teacher), "--student", str(tiny_pair.student), "--tune-file", str(file)])
    entries = tune_file.read_entries(file)
    assert {card for card, _, _ in entries} == {CARD}
    assert capsys.readouterr().out.splitlines() == [
        "score: 1 us",
        f"{format_count(len(entries), 'result')} for card written to {file}",
        f"the other commands read it where GENSSD_TUNE_FILE={file} is set",
    ]
    ((models, teacher, device, seconds),) = with_cuda
    assert [config.model_type for _, config in models] == ["llama"]
    assert teacher[1].model_type == "qwen3"
    assert device == torch.device("cuda", 0)
    assert seconds == 110.0
    assert not tune_file.default_path().exists()


def test_without_an_option_the_default_file_is_written(tiny_pair: TinyPair, with_cuda: list[Any]) -> None:
    summary = run_tune(TuneConfig(model_name_or_path=str(tiny_pair.student), dtype="float32"))
    assert summary.path == tune_file.default_path()
    assert len(tune_file.read_entries(summary.path)) == summary.problems == 1


def test_a_foreign_file_is_refused_before_anything_is_timed(
    tiny_pair: TinyPair, with_cuda: list[Any], tmp_path: Path
) -> None:
    file = tmp_path / "notes.json"
    file.write_text('{"lr": 1}')
    with pytest.raises(InputError, match=r"notes\.json was not written by .*; delete it, or name another file"):
        run_tune(TuneConfig(student=str(tiny_pair.student), tune_file=str(file)))
    assert with_cuda == []
    assert file.read_text() == '{"lr": 1}'
