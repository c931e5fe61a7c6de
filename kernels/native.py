"""Conditions under which the native CPU kernels run."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from genssd import _core

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_natively(*tensors: Tensor | None) -> bool:
    """Return whether the native kernels compute on these tensors; None stands for an absent optional one.

    All tensors must be on the CPU, have one dtype of DTYPES and a contiguous last axis.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    dtype = present[0].dtype
    return (
        dtype in DTYPES
        and all(t.dtype == dtype and t.device.type == "cpu" and t.stride(-1) == 1 for t in present)
        and has_native_kernels()
    )


def detach(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor without its autograd history: the native kernels refuse one that requires a gradient."""
    return None if tensor is None else tensor.detach()


def instruction_set() -> str | None:
    """Return the name of the instruction set that the native kernels use; None where they do not run."""
    return _core.instruction_set()


def list_instruction_sets() -> list[str]:
    """Return the instruction sets of this build that the processor runs, the best first."""
    return _core.instruction_sets()


def bfloat16_instructions() -> str | None:
    """Return the instruction set whose products of bfloat16 numbers the native kernels use; None where there is none.

    It is "amx" or "avx512_bf16".
    """
    name = _core.instruction_set()
    return name if name in ("amx", "avx512_bf16") else None


@cache
def has_native_kernels() -> bool:
    """Return whether native kernels exist for this processor. Warn once where there are none."""
    if _core.instruction_set() is None:
        warnings.warn(
            "genssd has native kernels for x86-64 processors with AVX2 and for 64-bit ARM; on this one plain torch "
            "serves, more slowly",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True
