"""Spares Triton's interpreter work that it repeats without effect."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

PLAIN_BUILTIN = core.builtin(lambda: None).__code__
"""Code of the wrapper that asks an operator's caller for `_semantic`, which the interpreter always gives."""


def hasten_interpreter() -> None:
    """Have the interpreter leave out what has no effect on a kernel; the rest takes a quarter of the time.

    * A launch puts the interpreter's operators in the place of Triton's in the modules that its kernel sees, and back;
      every call of a function inside the kernel does it again. Here they stay after the first call of each function.
    * Every addition and product of integers is computed again in 64 bits, for an assertion about overflow that only the
      option `debug` looks at.
    * The table of numpy's data types is built again for every number, and the description of a block's shape for every
      block.
    * Operands of equal shape are broadcast, those of equal types promoted, and values that are no constants of Triton's
      unwrapped.
    """
    builder, semantic = interpreter.interpreter_builder, interpreter.interpreter_semantic
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    semantic.__class__ = HastySemantic
    look_up = interpreter._get_np_dtype
    look_up_scalar = functools.cache(look_up)
    interpreter._get_np_dtype = lambda dtype: (look_up if dtype.scalar.is_ptr() else look_up_scalar)(dtype.scalar)
    core._unwrap_if_constexpr = spare_plain(core._unwrap_if_constexpr)
    core.dtype.__eq__ = spare_identical(core.dtype.__eq__)
    core.block_type.__init__ = describe_block
    core.block_type.name = property(lambda block: f"<{block.shape}, {block.element_ty}>")
    core.tensor.__init__ = hold
    interpreter._patch_attr = replace_operator
    interpreter._patch_lang = prepare_once(interpreter._patch_lang)


PLAIN = frozenset((int, float, bool, str, type(None), core.tensor, core.dtype, core.pointer_type, core.block_type))
"""Types of values that hold no constant of Triton's, which would have to be unwrapped."""


def spare_plain(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that unwraps constants of Triton's, and at once returns what is none."""
    return lambda value: value if type(value) in PLAIN else unwrap(value)


def spare_identical(equals: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """Return a comparison of types of which the same one is equal to itself."""
    return lambda left, right: left is right or equals(left, right)


def prepare_once(prepare: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that prepares the modules that a function sees at its first call, and never takes it back."""
    prepared: set[Any] = set()
    nothing_to_restore = interpreter._LangPatchScope()

    def prepare_first(function: Any) -> Any:
        if function not in prepared:
            prepared.add(function)
            prepare(function)
        return nothing_to_restore

    return prepare_first


def replace_operator(place: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Put the interpreter's form of an operator in the place of Triton's."""
    function = member.__wrapped__ if member.__code__ is PLAIN_BUILTIN else member

    def interpreted(*args: Any, **options: Any) -> Any:
        options["_semantic"] = interpreter.interpreter_semantic
        return function(*args, **options)

    scope.set_attr(place, name, interpreted)


@functools.cache
def describe_shape(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the shape of a tensor and its number of elements as constants of Triton."""
    return core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))


def hold(self: Any, handle: Any, type: Any) -> None:
    """Initialise a tensor as Triton does."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = describe_shape(type.shape if type.is_block() else ())


count_elements = functools.cache(core.validate_block_shape)
"""Number of elements of a block of a valid shape."""


def describe_block(self: Any, element_ty: Any, shape: Any) -> None:
    """Initialise the type of a block as Triton does."""
    self.element_ty = element_ty
    sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    is_known = {*map(type, sizes)} == {int}  # to a cache, a shape of floating-point numbers would be the same
    self.shape, self.numel = sizes, (count_elements if is_known else core.validate_block_shape)(sizes)


WIDE_TYPES = (core.float32, core.float64, core.int32, core.int64)
"""Types that no number of the same kind widens."""


class HastySemantic(TritonSemantic):
    """Triton's rules for operands, without the steps that change nothing."""

    def binary_op_type_checking_impl(
        self, lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True, div_or_mod: bool = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        if type(lhs) is core.tensor:
            if type(rhs) is core.tensor:
                same = lhs.dtype is rhs.dtype and not lhs.dtype.is_ptr() and (not div_or_mod or lhs.dtype in WIDE_TYPES)
                if same or (allow_lhs_ptr and lhs.dtype.is_ptr() and rhs.dtype in WIDE_TYPES[2:]):
                    return self.broadcast_impl_value(lhs, rhs)
            elif takes_number(lhs.dtype, rhs) and arithmetic_check:
                return self.broadcast_impl_value(lhs, self.scalar_constant(rhs, dtype=lhs.dtype))
        elif type(rhs) is core.tensor and takes_number(rhs.dtype, lhs) and arithmetic_check:
            return self.broadcast_impl_value(self.scalar_constant(lhs, dtype=rhs.dtype), rhs)
        return super().binary_op_type_checking_impl(
            lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        )

    def cast(self, input: Any, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Any:
        return input if input.dtype is dst_ty.scalar else super().cast(input, dst_ty, fp_downcast_rounding)

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = lhs.type.is_block(), rhs.type.is_block()
        if left and right:
            if lhs.type.shape == rhs.type.shape:
                return lhs, rhs
            if len(lhs.type.shape) == len(rhs.type.shape):
                pairs = zip(lhs.type.shape, rhs.type.shape, strict=True)
                shape = tuple([b if a == 1 else a for a, b in pairs])
                return self.broadcast_impl_shape(lhs, shape), self.broadcast_impl_shape(rhs, shape)
        elif left:
            return lhs, self.fill(lhs.type.shape, rhs)
        elif right:
            return self.fill(rhs.type.shape, lhs), rhs
        return super().broadcast_impl_value(lhs, rhs)

    def fill(self, shape: tuple[int, ...], scalar: Any) -> Any:
        """Return a block of a scalar."""
        handle = scalar.handle
        data = np.full(shape, handle.data, dtype=interpreter._get_np_dtype(handle.dtype))
        return core.tensor(interpreter.TensorHandle(data, handle.dtype), core.block_type(scalar.dtype, shape))


def takes_number(dtype: Any, number: Any) -> bool:
    """Return whether a number of Python's becomes one of this type beside a tensor of it, and fits into it."""
    if type(number) is int:
        return dtype in WIDE_TYPES and -(1 << 31) <= number < 1 << 31
    return type(number) is float and (dtype is core.float32 or dtype is core.float64)
