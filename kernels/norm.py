"""Root-mean-square normalisation (Zhang & Sennrich, 2019), alone and behind a residual sum.

Shapes:  N rows   D width
"""

from __future__ import annotations

import torch
from torch import Tensor

from genssd.kernels.inference import refuse_gradients


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the mean in float32, the product in the dtype of x.

    x: [..., D]. weight: [D], in the dtype of x. Raises ValueError on a CUDA device where a gradient is asked for.
    """
    if x.is_cuda and x.dtype != torch.float64:
        # imported here, because Triton need not be installed where there is no GPU
        from genssd.kernels.norm_triton import rms_norm_rows

        refuse_gradients("rms_norm", x, weight)
        return rms_norm_rows(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(sum), sum) of sum = residual + x, which is rounded to their dtype first. Both are new tensors.

    Raises ValueError on a CUDA device where a gradient is asked for.
    """
    if x_ND.is_cuda and x_ND.dtype != torch.float64:
        from genssd.kernels.norm_triton import add_rms_norm_rows

        refuse_gradients("add_rms_norm", x_ND, residual_ND, weight_D)
        return add_rms_norm_rows(x_ND, residual_ND, weight_D, eps)
    return add_rms_norm_reference(x_ND, residual_ND, weight_D, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm_reference(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    total_ND = residual_ND + x_ND
    return rms_norm_reference(total_ND, weight_D, eps), total_ND
