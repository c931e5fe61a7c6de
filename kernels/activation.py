"""Gated linear units (Shazeer, 2020): the activations of feed-forward layers.

Shapes:  N rows   F feed-forward width
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.inference import refuse_gradients
from genssd.kernels.native import runs_natively
from genssd.kernels.threads import num_threads

Activation = Callable[[Tensor], Tensor]
"""A function from [N, 2 F], the gate's columns before those of up, to [N, F]: `swiglu`, `geglu`, or `clamped_swiglu`
with its options bound by functools.partial."""


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """Return silu(gate) * up, [N, F], for gate_up [N, 2 F], whose first F columns are the gate.

    The result is computed in float32 and rounded once to the dtype of gate_up. Raises ValueError where a gradient is
    required and a native or Triton kernel would run, because these record none.
    """
    if gate_up_N2F.is_cuda and gate_up_N2F.dtype != torch.float64:
        # imported here, because Triton need not be installed where there is no GPU
        from genssd.kernels.activation_triton import gated_rows

        refuse_gradients("swiglu", gate_up_N2F)
        return gated_rows(gate_up_N2F, "silu")
    if runs_natively(gate_up_N2F):
        return _gate_natively("swiglu", gate_up_N2F, "silu")
    return swiglu_reference(gate_up_N2F)


def geglu(gate_up_N2F: Tensor) -> Tensor:
    """Return gelu(gate) * up, [N, F], for gate_up [N, 2 F], whose first F columns are the gate.

    gelu is taken in its tanh approximation (Hendrycks & Gimpel, 2016). The result is computed in float32 and rounded
    once to the dtype of gate_up. Raises ValueError where a gradient is required and a native or Triton kernel would
    run, because these record none.
    """
    if gate_up_N2F.is_cuda and gate_up_N2F.dtype != torch.float64:
        from genssd.kernels.activation_triton import gated_rows

        refuse_gradients("geglu", gate_up_N2F)
        return gated_rows(gate_up_N2F, "gelu")
    if runs_natively(gate_up_N2F):
        return _gate_natively("geglu", gate_up_N2F, "gelu")
    return geglu_reference(gate_up_N2F)


def clamped_swiglu(gate_up_N2F: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """Return (up + 1) * gate * sigmoid(alpha * gate), [N, F], for gate_up [N, 2 F], whose first F columns are the gate.

    Before, the gate is bounded by limit from above, and up by -limit and limit (GPT-OSS, whose checkpoints alternate
    the rows of gate and up: here the gate's come first). The result is computed in float32 and rounded once to the
    dtype of gate_up. Raises ValueError on a limit that is not above 0, and where a gradient is required and a native or
    Triton kernel would run, because these record none.
    """
    if not limit > 0:
        raise ValueError(f"clamped_swiglu: limit must be above 0, not {limit}")
    if gate_up_N2F.is_cuda and gate_up_N2F.dtype != torch.float64:
        from genssd.kernels.activation_triton import gated_rows

        refuse_gradients("clamped_swiglu", gate_up_N2F)
        return gated_rows(gate_up_N2F, "clamped", alpha=alpha, limit=limit)
    if runs_natively(gate_up_N2F):
        return _gate_natively("clamped_swiglu", gate_up_N2F, "clamped", alpha, limit)
    return clamped_swiglu_reference(gate_up_N2F, alpha=alpha, limit=limit)


def _gate_natively(function: str, gate_up_N2F: Tensor, gate: str, alpha: float = 0.0, limit: float = 0.0) -> Tensor:
    refuse_gradients(function, gate_up_N2F)
    out = gate_up_N2F.new_empty(gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2)
    _core.gated(gate_up_N2F.detach().contiguous(), gate, alpha, limit, out, num_threads())
    return out


def swiglu_reference(gate_up_N2F: Tensor) -> Tensor:
    """Compute `swiglu` in plain torch, differentiably."""
    gate, up = _widen(gate_up_N2F).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up_N2F.dtype)


def geglu_reference(gate_up_N2F: Tensor) -> Tensor:
    """Compute `geglu` in plain torch, differentiably."""
    gate, up = _widen(gate_up_N2F).chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(gate_up_N2F.dtype)


def clamped_swiglu_reference(gate_up_N2F: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """Compute `clamped_swiglu` in plain torch, differentiably."""
    gate, up = _widen(gate_up_N2F).chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(alpha * gate)).to(gate_up_N2F.dtype)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
