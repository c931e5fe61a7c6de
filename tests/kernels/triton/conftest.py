"""These tests run Triton's interpreter, which has to be chosen before Triton is imported: in a process of its own.

`tests/kernels/test_interpreter.py` starts it; by hand: TRITON_INTERPRET=1 pytest tests/kernels/triton
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    from support.interpreter import hasten_interpreter

    from genssd.kernels import draw_triton

    hasten_interpreter()
    # the interpreter takes as long for a large block as for a small one; tests of small blocks choose their own, and
    # the block that ships is compiled in tests/kernels/test_ahead_of_time.py
    draw_triton.DRAW_TILING = draw_triton.DrawTiling(split=4096, block=4096, num_warps=1)
