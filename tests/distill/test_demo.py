"""The demo, scaled down: everything runs, and the report holds what was printed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from genssd.distill.demo import run_demo
from genssd.distill.demo_config import DemoConfig
from genssd.engine.common.errors import InputError


@pytest.mark.slow
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
    for arm in ("standard", "selected", "post-hoc"):
        assert (tmp_path / "demo" / arm / "student" / "model.safetensors").exists()
        assert len((tmp_path / "demo" / arm / "selections.jsonl").read_text().splitlines()) == 12
    # again in the same place: the earlier demo is replaced
    run_demo(config, Console(file=io.StringIO()), Console(file=io.StringIO()))


def test_a_directory_with_other_things_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    (tmp_path / "train.jsonl").write_text("mine")
    with pytest.raises(InputError, match="is not empty and not of an earlier demo"):
        run_demo(DemoConfig(output_dir=str(tmp_path)), Console(), Console())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex", "train.jsonl"]
    assert (tmp_path / "train.jsonl").read_text() == "mine"
