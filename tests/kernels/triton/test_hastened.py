"""What `hasten_interpreter` leaves out has no effect: types, shapes and values are those of Triton's own steps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

HASTY: Any = interpreter.interpreter_semantic
PLAIN: Any = TritonSemantic(interpreter.interpreter_builder)
DTYPES = (core.float32, core.float16, core.bfloat16, core.float64, core.int1, core.int32, core.int64, core.uint32)
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (4,), (8,), (1, 4), (4, 1), (4, 4), (2, 4, 1), (2, 1, 4))


def make(dtype: Any, shape: tuple[int, ...] = ()) -> Any:
    """Return a tensor of one bits."""
    data = np.ones(shape or (1,), dtype=interpreter._get_np_dtype(dtype))
    type_ = core.block_type(dtype, shape) if shape else dtype
    return core.tensor(interpreter.TensorHandle(data, dtype), type_)


def describe(value: Any) -> Any:
    """Return all that a tensor is."""
    shape = [size.value for size in value.shape]
    types = (str(value.type), str(value.dtype), str(value.handle.dtype), str(value.handle.data.dtype))
    return types, shape, value.numel.value, value.handle.data.tolist()


def outcome(function: Any, *arguments: Any) -> Any:
    """Return what a function of two operands returns, or the class of its error."""
    try:
        return [describe(value) for value in function(*arguments)]
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", ["broadcast_impl_value", "binary_op_type_checking_impl"])
def test_operands_of_all_shapes(name: str) -> None:
    for left, right in itertools.product(SHAPES, repeat=2):
        operands = make(core.float32, left), make(core.int32, right)
        if len(left) == len(right) or not left or not right:  # Triton's own step for other ranks fails
            assert outcome(getattr(HASTY, name), *operands) == outcome(getattr(PLAIN, name), *operands), (left, right)


NUMBERS = (0, 1, -1, 7, -(1 << 31), (1 << 31) - 1, 1 << 31, -(1 << 40), 0.0, -0.0, 1.5, -2.5, 1e300, True)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("divides", [False, True])
def test_operands_of_all_types_and_numbers(divides: bool) -> None:
    pointer = make(core.pointer_type(core.float32), (4,))
    operands = [*NUMBERS, pointer, *(make(dtype, shape) for dtype in DTYPES for shape in ((), (4,)))]
    for left, right in itertools.product(operands, repeat=2):
        for pointers in ((False, False), (True, True)):
            for arithmetic in (True, False):
                options = (*pointers, arithmetic, divides)
                ours = outcome(HASTY.binary_op_type_checking_impl, left, right, *options)
                assert ours == outcome(PLAIN.binary_op_type_checking_impl, left, right, *options), (left, right)


def test_casts_of_all_types() -> None:
    for source, target in itertools.product(DTYPES, repeat=2):
        for shape in ((), (4,)):
            value = make(source, shape)
            assert describe(HASTY.cast(value, target)) == describe(PLAIN.cast(value, target)), (source, target)


def test_types_of_blocks() -> None:
    block = core.block_type(core.float32, [core.constexpr(4), 8])
    assert (block.shape, block.numel, block.name, block.scalar) == ((4, 8), 32, "<(4, 8), fp32>", core.float32)
    assert block == core.block_type(core.float32, core.tuple([4, 8])) != core.block_type(core.int32, [4, 8])
    for shape, error in (((), TypeError), ((3,), ValueError), ((4.0,), TypeError), ((1 << 21,), ValueError)):
        with pytest.raises(error):
            core.block_type(core.float32, shape)
