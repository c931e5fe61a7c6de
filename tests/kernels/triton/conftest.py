"""These tests run Triton's interpreter, which has to be chosen before Triton is imported: in processes of their own.

`tests/kernels/test_interpreter.py` starts them; by hand: TRITON_INTERPRET=1 pytest tests/kernels/triton
GENSSD_INTERPRETER_PART=1/3 runs the second of three parts: every third test, so that all parts take as long.
"""

from __future__ import annotations

import os

import pytest

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    from support.interpreter import hasten_interpreter

    from genssd.kernels import draw_triton

    hasten_interpreter()
    # the interpreter takes as long for a large block as for a small one; tests of small blocks choose their own, and
    # the block that ships is compiled in tests/kernels/test_ahead_of_time.py
    draw_triton.DRAW_TILING = draw_triton.DrawTiling(split=4096, block=4096, num_warps=1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, _, parts = os.environ.get("GENSSD_INTERPRETER_PART", "0/1").partition("/")
    left_out = [item for place, item in enumerate(items) if place % int(parts) != int(part)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = items[int(part) :: int(parts)]
