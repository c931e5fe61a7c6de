"""Gated linear units (Shazeer, 2020).

Shapes:  N rows   F feed-forward width
"""

from __future__ import annotations

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.inference import refuse_gradients
from genssd.kernels.native import runs_natively
from genssd.kernels.threads import num_threads


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """Return silu(gate) * up, [N, F], for gate_up [N, 2 F], whose first F columns are the gate.

    The result is computed in float32 and rounded once to the dtype of gate_up. Raises ValueError where a gradient is
    required and a native or Triton kernel would run, because these record none.
    """
    if gate_up_N2F.is_cuda and gate_up_N2F.dtype != torch.float64:
        # imported here, because Triton need not be installed where there is no GPU
        from genssd.kernels.activation_triton import gated_rows

        refuse_gradients("swiglu", gate_up_N2F)
        return gated_rows(gate_up_N2F, gelu=False)
    if runs_natively(gate_up_N2F):
        return _gate_natively(gate_up_N2F, gelu=False)
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
        return gated_rows(gate_up_N2F, gelu=True)
    if runs_natively(gate_up_N2F):
        return _gate_natively(gate_up_N2F, gelu=True)
    return geglu_reference(gate_up_N2F)


def _gate_natively(gate_up_N2F: Tensor, *, gelu: bool) -> Tensor:
    refuse_gradients("geglu" if gelu else "swiglu", gate_up_N2F)
    out = gate_up_N2F.new_empty(gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2)
    _core.gated(gate_up_N2F.contiguous(), gelu, out, num_threads())
    return out


def swiglu_reference(gate_up_N2F: Tensor) -> Tensor:
    """Compute `swiglu` in plain torch, differentiably."""
    gate, up = _widen(gate_up_N2F).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up_N2F.dtype)


def geglu_reference(gate_up_N2F: Tensor) -> Tensor:
    """Compute `geglu` in plain torch, differentiably."""
    gate, up = _widen(gate_up_N2F).chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(gate_up_N2F.dtype)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
