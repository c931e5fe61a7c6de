"""The demo, scaled down: everything runs, and the report holds what was printed."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from genssd.distill.demo import processes as demo_processes
from genssd.distill.demo.config import DemoConfig
from genssd.distill.demo.processes import divide_threads, run_parts
from genssd.distill.demo.run import run_demo
from genssd.engine.common.errors import InputError, WorkerError


@pytest.mark.slow
@pytest.mark.usefixtures("forked_workers")
def test_the_whole_job(tmp_path: Path) -> None:
    screen, progress = io.StringIO(), io.StringIO()
    config = DemoConfig(
        output_dir=str(tmp_path / "demo"), prompts=12, train_tokens=1500, eval_problems=6, batch_size=4, post_hoc=True
    )
    result = run_demo(config, Console(file=screen, width=100), Console(file=progress))
    written = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert list(written["arms"]) == ["standard", "selected", "post-hoc"]
    assert set(written["minus_standard"]) == {"selected", "post-hoc"}
    standard, selected = written["arms"]["standard"], written["arms"]["selected"]
    assert standard["tokens_kept"] == standard["tokens_sampled"]
    assert selected["tokens_sampled"] > 2 * selected["tokens_kept"]
    text = screen.getvalue()
    assert "kept" in text
    assert "beaten" in text
    assert "selected - standard" in text
    assert "docs/results.md" in text
    assert "genssd reproduce apart" in " ".join(text.split())
    for arm in ("standard", "selected", "post-hoc"):
        assert (tmp_path / "demo" / arm / "student" / "model.safetensors").exists()
        assert len((tmp_path / "demo" / arm / "selections.jsonl").read_text().splitlines()) == 12
    # again in the same place, in two processes: the earlier demo is replaced by the same results
    again = run_demo(dataclasses.replace(config, threads=2), Console(file=io.StringIO()), Console(file=io.StringIO()))
    assert (result["processes"], again["processes"]) == (1, 2)
    for part in ("cold_start", "arms", "minus_standard"):
        assert _without_times(again[part]) == _without_times(result[part])


def _without_times(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: _without_times(value) for name, value in values.items() if "second" not in name}


def test_threads_are_divided_between_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores, threads, expected in ((1, None, (None, 1)), (2, None, (1, 2)), (8, None, (1, 2)), (8, 6, (3, 2))):
        monkeypatch.setattr("genssd.engine.host.threads.available_cores", lambda cores=cores: cores)
        config, num_processes = divide_threads(DemoConfig(threads=threads))
        assert (config.threads, num_processes) == expected


class _Killed:
    """A process that was killed before it said anything."""

    exitcode = -9

    def kill(self) -> None: ...

    def join(self) -> None: ...


def test_a_killed_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = multiprocessing.Pipe()
    far.close()
    monkeypatch.setattr(demo_processes, "start_process", lambda *_: (_Killed(), near))
    monkeypatch.setattr(demo_processes, "run_part", lambda *_: time.sleep(0.2))  # the second one gets the other part
    with pytest.raises(WorkerError, match=r"the process of standard was killed by SIGKILL"):
        run_parts(["standard", "selected"], None, DemoConfig(threads=1), 2, Console(quiet=True))  # type: ignore[arg-type]


def test_a_directory_with_other_things_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(InputError, match="is not empty and not of an earlier demo"):
        run_demo(DemoConfig(output_dir=str(tmp_path)), Console(), Console())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex", "train.jsonl"]
    assert (tmp_path / "train.jsonl").read_text() == "mine"
