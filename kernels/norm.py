"""Root-mean-square normalisation (Zhang & Sennrich, 2019), alone and behind a residual sum.

Shapes:  N rows   D width
"""

from __future__ import annotations

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.inference import refuse_gradients
from genssd.kernels.native import runs_natively


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean in float32, the product in the dtype of x.

    x: [..., D]. weight: [D], in the dtype of x. Raises ValueError where a gradient is asked for and a kernel of ours
    runs.
    """
    if x.is_cuda and x.dtype != torch.float64:
        # imported here, because Triton need not be installed where there is no GPU
        from genssd.kernels.norm_triton import rms_norm_rows

        refuse_gradients("rms_norm", x, weight)
        return rms_norm_rows(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)
    if runs_natively(x, weight):
        refuse_gradients("rms_norm", x, weight)
        rows = x.detach().reshape(-1, x.shape[-1])
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        _core.rms_norm(rows, None, weight.detach(), eps, out, None, torch.get_num_threads())
        return out.view(x.shape)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(sum), sum) of sum = residual + x, which is rounded to their dtype first. Both are new tensors.

    Raises ValueError where a gradient is asked for and a kernel of ours runs.
    """
    if x_ND.is_cuda and x_ND.dtype != torch.float64:
        from genssd.kernels.norm_triton import add_rms_norm_rows

        refuse_gradients("add_rms_norm", x_ND, residual_ND, weight_D)
        return add_rms_norm_rows(x_ND, residual_ND, weight_D, eps)
    if runs_natively(x_ND, residual_ND, weight_D):
        refuse_gradients("add_rms_norm", x_ND, residual_ND, weight_D)
        normed, total = (torch.empty_like(x_ND, memory_format=torch.contiguous_format) for _ in range(2))
        _core.rms_norm(
            x_ND.detach(), residual_ND.detach().contiguous(), weight_D.detach(), eps, normed, total,
            torch.get_num_threads(),
        )  # fmt: skip
        return normed, total
    return add_rms_norm_reference(x_ND, residual_ND, weight_D, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm_reference(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    total_ND = residual_ND + x_ND
    return rms_norm_reference(total_ND, weight_D, eps), total_ND
