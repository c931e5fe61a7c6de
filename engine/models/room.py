"""Room in a cache for a pass that nothing was reserved for: what others only keep in store is given up for it."""

from __future__ import annotations

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CapacityError
from genssd.engine.models.runner import ModelRunner


def require_room(runner: ModelRunner, num_pages: int, subject: str, *, noun: str = "page") -> None:
    """Have so many pages free, and shared prefixes give up theirs where that is needed.

    Raises CapacityError where the branches of others leave too few. subject: what needs the pages, with the verb.
    noun: what is counted.
    """
    tree = runner.tree
    if not tree.make_room(num_pages):
        raise CapacityError(
            f"{subject} {format_count(num_pages, noun)}, with {tree.num_free} free of the {tree.pool.describe()} of "
            f"the {runner.role}'s cache; raise memory_bytes or memory_utilization"
        )
