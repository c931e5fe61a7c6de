"""Processes that are forked from one that has imported everything, which takes no time."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest

from genssd.distill.pool import starting

PRELOADED = (
    "genssd.commands",
    "genssd.distill.pool.worker",
    "genssd.distill.score.leaf",
    "genssd.distill.diagnose.run",
    "genssd.distill.train.process_body",
    "transformers.models.llama.modeling_llama",
    "support.pool_works",
)


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starting, "START_METHOD", "forkserver")
        yield
