"""Root-mean-square normalisation (Zhang & Sennrich, 2019), alone and after a residual sum.

Model families differ in where the product with the weight is rounded, which `offset` says:

    None        round(x / sqrt(mean(x^2) + eps)) * weight, the product in the dtype of x         (Llama, Qwen, Mistral)
    a number    x / sqrt(mean(x^2) + eps) * (offset + weight) in float32, rounded once to the dtype of x
                (0: OLMo 2, GPT-OSS; 1: Gemma, whose checkpoints store the weight's distance from 1)

Shapes:  N rows   D width
"""

from __future__ import annotations

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.inference import refuse_gradients
from genssd.kernels.native import runs_natively
from genssd.kernels.threads import num_threads


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float | None = None) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, in the shape and dtype of x.

    x: [..., D]. weight: [D], in the dtype of x. The mean is taken in float32, the product with weight in the dtype of
    x; with an offset, which is added to weight, the product is taken in float32, too, and rounded once. Raises
    ValueError on a weight of another width or dtype, and where a gradient is required and a native or Triton kernel
    would run, because these record none.
    """
    _check_weight("rms_norm", x, weight)
    if x.is_cuda and x.dtype != torch.float64:
        # imported here, because Triton need not be installed where there is no GPU
        from genssd.kernels.norm_triton import rms_norm_rows

        refuse_gradients("rms_norm", x, weight)
        return rms_norm_rows(x.reshape(-1, x.shape[-1]), weight, eps, offset).view(x.shape)
    if runs_natively(x, weight):
        refuse_gradients("rms_norm", x, weight)
        rows = x.detach().reshape(-1, x.shape[-1])
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        _core.rms_norm(rows, None, weight.detach(), eps, offset, out, None, num_threads())
        return out.view(x.shape)
    return rms_norm_reference(x, weight, eps, offset=offset)


def add_rms_norm(
    x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float, *, offset: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(sum), sum), both new tensors [N, D], of sum = residual + x.

    The sum is rounded to the dtype of x before it is normalised. weight_D: in the dtype of x. offset: see rms_norm.
    Raises ValueError on a weight of another width or dtype, and where a gradient is required and a native or Triton
    kernel would run, because these record none.
    """
    _check_weight("add_rms_norm", x_ND, weight_D)
    if x_ND.is_cuda and x_ND.dtype != torch.float64:
        from genssd.kernels.norm_triton import add_rms_norm_rows

        refuse_gradients("add_rms_norm", x_ND, residual_ND, weight_D)
        return add_rms_norm_rows(x_ND, residual_ND, weight_D, eps, offset)
    if runs_natively(x_ND, residual_ND, weight_D):
        refuse_gradients("add_rms_norm", x_ND, residual_ND, weight_D)
        normed, total = (torch.empty_like(x_ND, memory_format=torch.contiguous_format) for _ in range(2))
        _core.rms_norm(
            x_ND.detach(), residual_ND.detach().contiguous(), weight_D.detach(), eps, offset, normed, total,
            num_threads(),
        )  # fmt: skip
        return normed, total
    return add_rms_norm_reference(x_ND, residual_ND, weight_D, eps, offset=offset)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, offset: float | None = None) -> Tensor:
    """Compute `rms_norm` in plain torch, differentiably."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if offset is None:
        return weight * unit.to(x.dtype)
    return (unit * (offset + weight.to(wide.dtype))).to(x.dtype)


def add_rms_norm_reference(
    x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float, *, offset: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` in plain torch, differentiably."""
    total_ND = residual_ND + x_ND
    return rms_norm_reference(total_ND, weight_D, eps, offset=offset), total_ND


def _check_weight(function: str, x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"{function}: weight must be {x.dtype} [{x.shape[-1]}], not {weight.dtype} {list(weight.shape)}"
        )
