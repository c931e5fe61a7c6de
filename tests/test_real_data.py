"""Real problems through the whole chain, where the data lies beside the checkout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.shared_data import SHARED_DATA

from genssd.cli import main
from genssd.distill import small_pair

PAIR = Path(next(iter(small_pair.__path__)))


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED_DATA / "gsm8k").exists(), reason="no real data beside the checkout")
def test_gsm8k_is_selected_trained_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = SHARED_DATA / "gsm8k" / "train.jsonl", SHARED_DATA / "gsm8k" / "test.jsonl"
    main(
        f"select --teacher {PAIR / 'teacher'} --student {PAIR / 'student'} --data {train} --limit 64 --chunk.tokens 8 "
        f"--max-tokens 48 --memory-bytes {1 << 28} --output-dir {tmp_path / 'select'}".split()
    )
    selections = tmp_path / "select" / "selections.jsonl"
    rows = [json.loads(line) for line in selections.read_text().splitlines()]
    assert sorted(row["index"] for row in rows) == list(range(64))
    assert all(row["answer"] for row in rows)
    main(
        f"train --model-name-or-path {PAIR / 'student'} --data {selections} --statuses finished length "
        f"--output-dir {tmp_path / 'train'}".split()
    )
    main(
        f"evaluate --model {tmp_path / 'train'} --data {test} --limit 64 --max-tokens 48 --memory-bytes {1 << 28} "
        f"--output-dir {tmp_path / 'evaluate'}".split()
    )
    out = capsys.readouterr().out
    assert "64 prompts: " in out
    assert "8 steps on 64 examples" in out
    assert "over 64 problems" in out


@pytest.mark.skipif(not (SHARED_DATA / "mawps").exists(), reason="no real data beside the checkout")
def test_mawps_is_diagnosed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The small student does not solve these: the run ends, and says what it could not see."""
    main(
        f"diagnose --student {PAIR / 'student'} --teacher {PAIR / 'teacher'} --contexts target --limit 3 "
        f"--data {SHARED_DATA / 'mawps' / 'multiarith.jsonl'} --max-tokens 64 --rollouts 2 --budget 64 --completions 4 "
        f"--memory-bytes {1 << 28} --output-dir {tmp_path}".split()
    )
    out = capsys.readouterr().out
    nodes = [json.loads(line) for line in (tmp_path / "nodes.jsonl").read_text().splitlines()]
    undefined = [node for node in nodes if node["alignment"]["teacher"]["jsd"] in ("forced", "flat")]
    assert len(undefined) >= 0.75 * len(nodes) > 0
    assert "The student gets 0% of its rollouts right." in out
    assert "no verdict" in out
