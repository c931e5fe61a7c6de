"""The counts of a pool are the sums over its workers, those that ended included."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from genssd.distill.pool.messages import Counts, Ready
from genssd.distill.pool.remote_models import RemoteModels
from genssd.engine.common.usage import CacheUse, Usage

CACHE = CacheUse(held_pages=0, pages=1, held_bytes=0, bytes=1)
READY: dict[str, Any] = {
    "pairs": [], "threads": 1, "instruction_set": None, "launches": None, "cache_use": CACHE, "server": None,
}  # fmt: skip
NAMES = [field.name for field in dataclasses.fields(Usage)]


def test_the_kept_total_is_the_sum_over_all_workers() -> None:
    """Workers come, report growing counts, and end; what an ended one had planned and not done is not counted."""
    draws, models = random.Random(0), RemoteModels([])
    living: dict[int, dict[str, int]] = {}
    ended: list[dict[str, int]] = []
    for step in range(300):
        kind = draws.choice(("add", "count", "count", "count", "remove"))
        if kind == "add":
            living[step] = dict.fromkeys(NAMES, 0)
            models.add(step, Ready(**READY))
        elif living:
            worker = draws.choice(list(living))
            if kind == "count":
                living[worker] = {name: count + draws.randrange(9) for name, count in living[worker].items()}
                models.count(worker, Counts(Usage(**living[worker]), CACHE, None))
            else:
                last: dict[str, Any] = living.pop(worker)
                done = {"planned_prompts": last["finished_prompts"], "planned_tokens": last["sampled_tokens"]}
                ended.append({**last, **done})
                models.remove(worker)
        total = {name: sum(counts[name] for counts in [*living.values(), *ended]) for name in NAMES}
        assert dataclasses.asdict(models.count_usage()) == total
    models.to_come = (3, 50)
    planned = dataclasses.asdict(models.count_usage())
    assert planned["planned_prompts"] == total["planned_prompts"] + 3
    assert planned["planned_tokens"] == total["planned_tokens"] + 150
    assert len(ended) > 20
