"""Triton kernel of `swiglu`, `geglu` and `clamped_swiglu`: all are gate * sigmoid(u) * up, each with a u of its own.

Shapes:  N rows   F feed-forward width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # entries of a row that one program computes
GATES = {"silu": 0, "gelu": 1, "clamped": 2}
"""Numbers of the activations, as the kernel knows them."""


@triton.jit
def _gated_kernel(
    gate_up, out,  # [N, 2 F] [N, F]
    F, stride_x, alpha, limit,
    GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * stride_x + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride_x + F + f, mask=f < F, other=0.0).to(tl.float32)
    if GATE == 2:
        # a NaN stays
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
        u = alpha * gate
    elif GATE == 1:
        # (1 + tanh(v)) / 2 is sigmoid(2 v)
        u = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    else:
        u = gate
    value = gate / (1.0 + tl.exp(-u)) * up
    tl.store(out + row * F + f, value.to(out.dtype.element_ty), mask=f < F)


def gated_rows(gate_up_N2F: Tensor, gate: str, *, alpha: float = 0.0, limit: float = 0.0, block: int = BLOCK) -> Tensor:
    """Compute `activation.swiglu` ("silu"), `geglu` ("gelu") or `clamped_swiglu` ("clamped"), of which alone alpha and
    limit are. The rows may have any stride."""
    N, F = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
    if gate_up_N2F.stride(1) != 1:
        gate_up_N2F = gate_up_N2F.contiguous()
    out_NF = torch.empty(N, F, dtype=gate_up_N2F.dtype, device=gate_up_N2F.device)
    _gated_kernel[(N, -(-F // block))](
        gate_up_N2F, out_NF, F, gate_up_N2F.stride(0), float(alpha), float(limit),
        GATE=GATES[gate], BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out_NF
