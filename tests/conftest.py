"""Checkpoints that several test files share."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from support.ignored_files import IgnoredFiles
from support.tiny_pair import TinyPair
from support.toys import save_checkpoint

from genssd import Engine

# a busy machine is no failure, and a failure should be found again: no deadlines, the same examples every time
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with Triton's interpreter, then with the files that have slow tests.

    At the end of the suite each of them would keep one process busy while the others have nothing to do.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_interpreter.py", item.path not in slow))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what lives as long as the tests: modules and thousands of test items.

    Commands collect garbage before they load a model; that took most of the time of a small run.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    base = tmp_path_factory.mktemp("tiny")
    save_checkpoint(base / "teacher", "qwen3", seed=1)
    save_checkpoint(base / "student", "llama", seed=2)
    engine = Engine.from_pretrained(base / "teacher", base / "student", memory_bytes=1 << 24)
    return TinyPair(base / "teacher", base / "student", engine)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows to a JSONL file in the test's directory and return its path."""

    def write(rows: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    """Tests that change the number of threads do not leak it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


IGNORED_FILES = IgnoredFiles()


@pytest.fixture(autouse=True)
def read_what_a_clone_has() -> Iterator[None]:
    """Tests read no file of the source tree that git ignores."""
    IGNORED_FILES.pop()
    yield
    ignored = IGNORED_FILES.pop()
    assert not ignored, f"a fresh clone does not have {ignored}"


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
"""A PNG file of one pixel, in base 64."""


@pytest.fixture(autouse=True)
def leave_plots_out(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a pixel stand for the picture of a plot, unless a test is marked `plots`.

    Drawing takes nine tenths of the time of a small `genssd score`.
    """
    page = sys.modules.get("genssd.distill.score.page")
    with pytest.MonkeyPatch.context() as patch:
        if page is not None and request.node.get_closest_marker("plots") is None:
            patch.setattr(page, "_encode_png", lambda figure: PIXEL)
        yield
