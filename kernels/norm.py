"""Root-mean-square normalisation (Zhang & Sennrich, 2019), alone and after a residual sum.

Shapes:  N rows   D width
"""

from __future__ import annotations

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.inference import refuse_gradients
from genssd.kernels.native import runs_natively
from genssd.kernels.threads import num_threads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, in the shape and dtype of x.

    x: [..., D]. weight: [D], in the dtype of x. The mean is taken in float32, the product with weight in the dtype of
    x. Raises ValueError where a gradient is required and a native or Triton kernel would run, because these record
    none.
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
        _core.rms_norm(rows, None, weight.detach(), eps, out, None, num_threads())
        return out.view(x.shape)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(sum), sum), both new tensors [N, D], of sum = residual + x.

    The sum is rounded to the dtype of x before it is normalised. weight_D: in the dtype of x. Raises ValueError where a
    gradient is required and a native or Triton kernel would run, because these record none.
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
            num_threads(),
        )  # fmt: skip
        return normed, total
    return add_rms_norm_reference(x_ND, residual_ND, weight_D, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` in plain torch, differentiably."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm_reference(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` in plain torch, differentiably."""
    total_ND = residual_ND + x_ND
    return rms_norm_reference(total_ND, weight_D, eps), total_ND
