"""Matrix product of packed rows with a weight.

Shapes:  N rows   D inputs   M outputs
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_ROWS = 16
"""Below this many rows torch's BLAS adds in another order, and a row's bits would depend on how many others are
in the call. Measured with MKL in float32: from 16 rows on they do not, up to a few hundred inputs or on one thread.
Wider models on several threads may still differ in the last bit."""


def linear(x_ND: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [N, M] in the dtype of the inputs, or in out (of any dtype)."""
    rows = x_ND.shape[0]
    if x_ND.device.type == "cpu" and rows < MIN_ROWS:
        x_ND = torch.nn.functional.pad(x_ND, (0, 0, 0, MIN_ROWS - rows))
    elif out is not None and out.dtype == x_ND.dtype and bias_M is None:
        return torch.mm(x_ND, weight_MD.T, out=out)
    y = torch.nn.functional.linear(x_ND, weight_MD, bias_M)[:rows]
    return y if out is None else out.copy_(y)
