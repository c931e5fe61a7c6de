"""Captured decode steps on a real device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.toys import save_checkpoint

from genssd.engine.models import runner as runners
from genssd.engine.models.model import Decoder
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool
from genssd.kernels.attention import SEGMENT_TOKENS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

WINDOWED = {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1}
PROMPT = list(range(40, 100))


def load(directory: Path, pages: int = 2000) -> PagedRunner:
    decoder = Decoder.load(directory, torch.bfloat16, torch.device("cuda"))
    return PagedRunner("teacher", directory, decoder, PagePool.for_model(decoder, pages, 4))


def decode(runner: PagedRunner, branches: int, steps: int) -> torch.Tensor:
    """Hidden states of branches after one prompt, each with its own tokens: [steps, branches, D]."""
    trunk = runner.tree.root()
    runner.extend([trunk], [PROMPT])
    paths = [trunk, *(runner.tree.fork(trunk) for _ in range(branches - 1))]
    states = []
    for step in range(steps):
        hidden = runner.extend(paths, [[(7 * i + step) % 200] for i in range(branches)])
        states.append(torch.stack([rows[-1] for rows in hidden]))
    for path in paths:
        runner.tree.drop(path)
    return torch.stack(states)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, "qwen2", **WINDOWED)
    return tmp_path


@pytest.mark.parametrize("branches", [1, 8, 64])
@torch.inference_mode()
def test_a_captured_step_has_the_bits_of_an_eager_one(
    directory: Path, branches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the bucket is full: a matrix product of more rows may be another kernel's."""
    captured = decode(load(directory), branches, 40)
    monkeypatch.setattr(runners, "bucket_for", lambda rows: None)
    assert torch.equal(captured, decode(load(directory), branches, 40))


@torch.inference_mode()
def test_rows_that_fill_a_bucket_up_change_little(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = decode(load(directory), 5, 40)
    monkeypatch.setattr(runners, "bucket_for", lambda rows: None)
    torch.testing.assert_close(captured, decode(load(directory), 5, 40), atol=5e-2, rtol=5e-2)


@torch.inference_mode()
def test_a_step_does_not_wait_for_the_device(directory: Path) -> None:
    runner = load(directory)
    trunk = runner.tree.root()
    runner.extend([trunk], [PROMPT])
    paths = [trunk, *(runner.tree.fork(trunk) for _ in range(7))]
    token = [[5]] * 8
    for _ in range(3):  # captured, and every branch in pages of its own
        runner.extend(paths, token)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            runner.extend(paths, token)
        runner.extend(paths[:1], [PROMPT])  # an eager pass neither
        forked = runner.tree.fork(paths[1])
        runner.extend([forked, *paths[1:7]], [[6]] * 7)  # with the copy of a half-filled page
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_a_graph_that_is_outgrown_is_captured_anew(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over more and more segments."""
    monkeypatch.setitem(SEGMENT_TOKENS, "cuda", 16)
    runner = load(directory)
    assert runner._graphs is not None
    captured = decode(runner, 4, 300)
    layouts = runner._graphs._captured
    assert list(layouts) == [4]
    monkeypatch.setattr(runners, "bucket_for", lambda rows: None)
    assert torch.equal(captured, decode(load(directory), 4, 300))
