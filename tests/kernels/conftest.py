"""Which of the compilations ahead of time are part of the suite: GENSSD_AHEAD_OF_TIME=all runs every one of them."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

ALWAYS = "sm_90"
"""The GPU for which every case is compiled; of the others each case has one, in turn."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out two of three compilations for the other GPUs: they take as long as half of the suite.

    Every kernel is still compiled for every GPU, in some of its cases; a kernel with fewer than three keeps all.
    """
    if os.environ.get("GENSSD_AHEAD_OF_TIME") == "all":
        return
    kernels: defaultdict[tuple[object, ...], defaultdict[str, list[pytest.Item]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for item in items:
        if isinstance(item, pytest.Function) and item.path.name == "test_ahead_of_time.py":
            place, kernel, case = _read(item)
            if place != ALWAYS:
                kernels[item.originalname, kernel][case].append(item)
    left_out: set[pytest.Item] = set()
    for cases in kernels.values():
        for number, of_case in enumerate(cases.values()):
            if len(cases) >= 3 and len(of_case) >= 3:
                left_out.update(item for place, item in enumerate(of_case) if place % 3 != number % 3)
    if left_out:
        config.hook.pytest_deselected(items=sorted(left_out, key=lambda item: item.nodeid))
        items[:] = [item for item in items if item not in left_out]


def _read(item: pytest.Function) -> tuple[str, str, str]:
    """Return the GPU of a test's id, the kernel that it compiles, and its case without the GPU."""
    words = item.callspec.id.split("-")
    place = next((word for word in words if word.startswith(("sm_", "gfx"))), ALWAYS)
    kernel = item.callspec.params.get("kernel", item.callspec.params.get("name", ""))
    return place, getattr(kernel, "__name__", str(kernel)), "-".join(word for word in words if word != place)
