"""These tests run Triton's interpreter, which has to be chosen before Triton is imported: in a process of its own.

`tests/kernels/test_interpreter.py` starts it; by hand: TRITON_INTERPRET=1 pytest tests/kernels/triton
"""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
