"""Spares Triton's interpreter work that it repeats without effect."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


def hasten_interpreter() -> None:
    """Have the interpreter leave out what has no effect on a kernel; the rest takes half of the time.

    * A launch puts the interpreter's operators in the place of Triton's in the modules that its kernel sees. Every
      call of a function inside the kernel does it again, with no effect after the first call of that function.
    * Every addition and product of integers is computed again in 64 bits, for an assertion about overflow that only the
      option `debug` looks at.
    * The table of numpy's data types is built again for every number.
    """
    prepared: set[Callable[..., Any]] = set()
    prepare_and_call = interpreter.InterpretedFunction.__call__

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self.fn in prepared:
            return self.rewrite()(*args, **options)
        prepared.add(self.fn)
        return prepare_and_call(self, *args, **options)

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    look_up = interpreter._get_np_dtype
    look_up_scalar = functools.cache(look_up)
    interpreter._get_np_dtype = lambda dtype: (look_up if dtype.scalar.is_ptr() else look_up_scalar)(dtype.scalar)
