"""Which of the compilations ahead of time are part of the suite, and the record of their results.

GENSSD_AHEAD_OF_TIME=all compiles every one of them, GENSSD_AHEAD_OF_TIME=write those that the record does not have.
"""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict

import pytest

ALWAYS = "sm_90"
"""The GPU for which every case is compiled where nothing is recorded; of the others each case has one, in turn."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where another Triton compiled what is recorded, leave out two of three compilations for the other GPUs.

    All of them take as long as half of the suite. Every kernel is still compiled for every GPU, in some of its cases; a
    kernel with fewer than three keeps all.
    """
    if os.environ.get("GENSSD_AHEAD_OF_TIME") in ("all", "write") or importlib.util.find_spec("triton") is None:
        return
    from support.compiled_kernels import read_record

    if read_record():
        return
    kernels: defaultdict[tuple[object, ...], defaultdict[str, list[pytest.Item]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and item.path.name == "test_ahead_of_time.py"
            and "target" in item.fixturenames
        ):
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


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the record of compilations where GENSSD_AHEAD_OF_TIME=write asks for it."""
    if os.environ.get("GENSSD_AHEAD_OF_TIME") == "write":
        options = session.config.option
        if exitstatus or options.keyword or options.markexpr or hasattr(session.config, "workerinput"):
            pytest.exit("The record is written by a run of all compilations in one process, without -n, -k and -m.", 1)
        from support.compiled_kernels import write_record

        write_record()


def _read(item: pytest.Function) -> tuple[str, str, str]:
    """Return the GPU of a test's id, the kernel that it compiles, and its case without the GPU."""
    words = item.callspec.id.split("-")
    place = next((word for word in words if word.startswith(("sm_", "gfx"))), ALWAYS)
    kernel = item.callspec.params.get("kernel", item.callspec.params.get("name", ""))
    return place, getattr(kernel, "__name__", str(kernel)), "-".join(word for word in words if word != place)
