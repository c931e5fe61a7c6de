"""Check that the operators of the engine's forward pass are not differentiated: their kernels record no gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def refuse_gradients(function: str, *tensors: Tensor | None) -> None:
    """Raise ValueError where a tensor requires a gradient, which the kernel of this function would silently lose."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(f"{function} is not differentiated; call it under torch.inference_mode()")
