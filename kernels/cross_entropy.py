"""Cross-entropy under a linear head, without a [tokens, vocabulary] tensor.

    loss = sum_n -log softmax(hidden_n @ weight.T)[target_n]

The rows go through the head in blocks; a block's logits live only while it is computed, and once more in backward.

Shapes:  N rows   V vocabulary   D model width
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genssd.kernels.logprob import LOGITS_BYTES


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """The summed negative log-likelihood of target_N (int64), a float32 scalar, differentiable in hidden and weight.

    The product is taken in the dtype of its inputs (or autocast's), the softmax in float32 (float64 stays float64).
    Raises ValueError on shapes that do not agree.
    """
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden {tuple(hidden_ND.shape)} and weight {tuple(weight_VD.shape)} differ in width"
        )
    if target_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"linear_cross_entropy: target must be [{hidden_ND.shape[0]}], not {tuple(target_N.shape)}")
    rows = max(1, LOGITS_BYTES // (4 * weight_VD.shape[0]))
    total = hidden_ND.new_zeros((), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
    for h, target in zip(torch.split(hidden_ND, rows), torch.split(target_N, rows), strict=True):
        total = total + checkpoint(_block, h, weight_VD, target, use_reentrant=False)
    return total


def _block(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    z = torch.nn.functional.linear(hidden_ND, weight_VD)
    z = z if z.dtype == torch.float64 else z.float()
    return torch.nn.functional.cross_entropy(z, target_N, reduction="sum")
