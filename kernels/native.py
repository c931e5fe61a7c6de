"""Which tensors the native CPU kernels take."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from genssd import _core

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_natively(*tensors: Tensor | None) -> bool:
    """Whether all of them lie on the CPU, in one dtype that the kernels compute, with their last axis contiguous."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtype = given[0].dtype
    return (
        dtype in DTYPES
        and all(t.dtype == dtype and t.device.type == "cpu" and t.stride(-1) == 1 for t in given)
        and has_native_kernels()
    )


def detach(tensor: Tensor | None) -> Tensor | None:
    """Without its history: a tensor that wants a gradient cannot be handed out of torch."""
    return None if tensor is None else tensor.detach()


@cache
def has_native_kernels() -> bool:
    """Whether there are kernels for this processor. Warns once where there are none."""
    if _core.instruction_set() is None:
        warnings.warn(
            "genssd has native kernels for x86-64 processors with AVX2; on this one plain torch serves, more slowly",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True
