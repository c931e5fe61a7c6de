"""The programs of examples/ run on the small pair, and print what they promise."""

from __future__ import annotations

import re
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.source


def load(name: str) -> ModuleType:
    spec = util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_select_expand(capsys: pytest.CaptureFixture[str]) -> None:
    load("select_expand").main()
    out = capsys.readouterr().out
    assert len(re.findall(r"^round \d+ .* kept ", out, re.MULTILINE)) >= 2
    assert re.search(r"(finished|length); perplexity 1\.\d+; \d+ tokens kept\n$", out)


def test_own_criterion(capsys: pytest.CaptureFixture[str]) -> None:
    load("own_criterion").main()
    found = re.findall(r"target (\S+): prompt \d, (\S+) nats", capsys.readouterr().out)
    mean = {target: sum(float(v) for t, v in found if t == target) / 3 for target in ("0.0", "2.0")}
    assert len(found) == 6
    assert mean["0.0"] < mean["2.0"], "the criterion steers the search"


def test_own_search(capsys: pytest.CaptureFixture[str]) -> None:
    load("own_search").main()
    out = capsys.readouterr().out
    assert re.match(r"\d+ expansions, \d+ tokens sampled\n", out)
    assert out.endswith("\n0 pages still held\n")
    assert r"\boxed{" in out


def test_train_on_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("train_on_selection").main(str(tmp_path / "example"), problems=8, max_steps=2)
    out = capsys.readouterr().out
    assert re.search(r"tokens kept of .* sampled: .*selections\.jsonl\n2 steps, last loss \d", out)
    assert len(re.findall(r"accuracy (before|after ) +\d+\.\d %", out)) == 2
    assert (tmp_path / "example/train/model.safetensors").exists()
