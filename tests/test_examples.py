"""The programs of examples/ run on the small pair, and print what they promise."""

from __future__ import annotations

import re
import sys
from importlib import util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.source


def load(name: str) -> ModuleType:
    spec = util.spec_from_file_location(f"examples.{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class _Stats:
    """The statistics of a chunk of one token."""

    def __init__(self, nats: float) -> None:
        self.logprob = torch.tensor([-nats])

    def __len__(self) -> int:
        return 1


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


def test_lookahead(capsys: pytest.CaptureFixture[str]) -> None:
    load("lookahead").main()
    out = capsys.readouterr().out
    assert re.match(r"\d+ tokens sampled, 0\.\d+ nats per token, finished\n", out)
    assert out.endswith("\n0 pages still held\n")


def test_the_lookahead_takes_the_line_with_the_best_following_line() -> None:
    """Brute force over a tree of given surprisals: the lines themselves would be chosen otherwise."""

    class Line:
        """A branch whose chunk has one token; `following` are its candidates."""

        def __init__(self, nats: float, *following: Line) -> None:
            self.nats, self.following = nats, following
            self.ended = None if following else "finished"
            self.stats: _Stats | None = _Stats(nats)

        def commit(self) -> None:
            self.stats = None

        def expand(self, n: int, chunk: object) -> list[Line]:
            assert len(self.following) == n
            return list(self.following)

    easy_then_hard = Line(0.1, Line(3.0), Line(2.0))
    hard_then_easy = Line(0.5, Line(0.2), Line(4.0))
    engine = SimpleNamespace(expand=lambda branches, n, chunk: [branch.expand(n, chunk) for branch in branches])
    response = load("lookahead").look_ahead(engine, Line(0.0, easy_then_hard, hard_then_easy), width=2)
    assert response is hard_then_easy.following[0]


def test_mcts(capsys: pytest.CaptureFixture[str]) -> None:
    load("mcts").main()
    out = capsys.readouterr().out
    visits = re.search(r"visits of the first lines \[(\d+), (\d+), (\d+)\], best reward 0\.\d+\n", out)
    assert visits is not None
    assert sum(map(int, visits.groups())) == 23, "every iteration but the first passes one of the first lines"
    assert r"\boxed{148}" in out
    assert out.endswith("\n0 pages still held\n")


def test_train_on_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("train_on_selection").main(str(tmp_path / "example"), problems=8, max_steps=2)
    out = capsys.readouterr().out
    assert re.search(r"tokens kept of .* sampled: .*selections\.jsonl\n2 steps, last loss \d", out)
    assert len(re.findall(r"accuracy (before|after ) +\d+\.\d %", out)) == 2
    assert (tmp_path / "example/train/model.safetensors").exists()
