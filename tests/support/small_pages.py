"""An engine whose caches are so small that prompts are suspended."""

from __future__ import annotations

import torch
from support.toys import Pair

from genssd.engine.engine import Engine
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool


def small_pages(pair: Pair, num_pages: int, page_size: int = 1) -> Engine:
    """An engine whose two caches have pages of so few tokens that a few short prompts fill them."""
    engine = pair.engine()
    for role, runner in engine._resources.runners.items():
        pool = PagePool.for_model(runner.decoder, num_pages, page_size)
        pool.kv.fill_(torch.nan)
        engine._resources.runners[role] = PagedRunner(role, runner.directory, runner.decoder, pool)
    return engine
