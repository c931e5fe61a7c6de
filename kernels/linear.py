"""Matrix product of packed rows with a weight.

Shapes:  N rows   D inputs   M outputs
"""

from __future__ import annotations

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.native import detach, runs_natively
from genssd.kernels.threads import num_threads
from genssd.kernels.weight import PackedWeight, Weight, cells_of


def linear(x_ND: Tensor, weight_MD: Weight, bias_M: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, [N, M] in the dtype of the inputs, or write it into out and return that.

    out may also be float32 for narrower inputs, and is then not rounded to their dtype on the CPU and on CUDA. The
    native kernel records no gradient. On the CPU (float32, bfloat16,
    float16) a row's bits depend on that row and the weight alone, neither on the number of rows nor on the number of
    threads, and the sum is taken in float32.
    """
    out_is_supported = out is None or (out.dtype in (x_ND.dtype, torch.float32) and out.is_contiguous())
    if isinstance(weight_MD, PackedWeight) or (out_is_supported and runs_natively(x_ND, weight_MD, bias_M)):
        y = x_ND.new_empty(x_ND.shape[0], weight_MD.shape[0]) if out is None else out
        x_ND = x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()
        _core.linear(x_ND.detach(), cells_of(weight_MD), detach(bias_M), y, num_threads())
        return y
    if out is not None and bias_M is None and x_ND.is_cuda and out.dtype != x_ND.dtype:
        return torch.mm(x_ND, weight_MD.T, out_dtype=out.dtype, out=out)
    y = torch.nn.functional.linear(x_ND, weight_MD, bias_M)
    return y if out is None else out.copy_(y)
