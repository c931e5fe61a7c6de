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


def linear(x_ND: Tensor, weight_MD: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, [N, M] in the dtype of the inputs."""
    missing = MIN_ROWS - x_ND.shape[0]
    if x_ND.device.type != "cpu" or missing <= 0:
        return torch.nn.functional.linear(x_ND, weight_MD, bias_M)
    padded = torch.nn.functional.pad(x_ND, (0, 0, 0, missing))
    return torch.nn.functional.linear(padded, weight_MD, bias_M)[: x_ND.shape[0]]
