"""Triton kernel of `swiglu` and `geglu`: both activations are gate * sigmoid(u), each with a u of its own.

Shapes:  N rows   F feed-forward width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # entries of a row that one program computes


@triton.jit
def _gated_kernel(
    gate_up, out,  # [N, 2 F] [N, F]
    F, stride_x,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * stride_x + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride_x + F + f, mask=f < F, other=0.0).to(tl.float32)
    if GELU:
        # (1 + tanh(v)) / 2 is sigmoid(2 v)
        u = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate)
    else:
        u = gate
    value = gate / (1.0 + tl.exp(-u)) * up
    tl.store(out + row * F + f, value.to(out.dtype.element_ty), mask=f < F)


def gated_rows(gate_up_N2F: Tensor, *, gelu: bool, block: int = BLOCK) -> Tensor:
    """Compute `activation.swiglu`, or `activation.geglu` where gelu is set. The rows may have any stride."""
    N, F = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
    if gate_up_N2F.stride(1) != 1:
        gate_up_N2F = gate_up_N2F.contiguous()
    out_NF = torch.empty(N, F, dtype=gate_up_N2F.dtype, device=gate_up_N2F.device)
    _gated_kernel[(N, -(-F // block))](
        gate_up_N2F, out_NF, F, gate_up_N2F.stride(0), GELU=gelu, BLOCK=block, num_warps=4
    )
    return out_NF
