"""Losses between a student's head and a frozen teacher's, a chunk of rows at a time, in plain torch.

A chunk is computed again in the backward pass, both heads of it: kept, the logits would be [rows, vocabulary].

Shapes:  N rows   C rows of a chunk   V student's vocabulary   U teacher's vocabulary   D student's width
         E teacher's width
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genssd.kernels.head import HeadLoss, check_head, choose_product_dtype, resolve_row_weights, rows_per_chunk

ChunkLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function from the logits of a chunk before any softcap (the student's [C, V], differentiable, and the teacher's
[C, U], without gradient) and the indices of its rows, int64 [C], to the losses of the rows, [C]."""


def sum_chunk_losses(
    function: str,
    chunk_loss: ChunkLoss,
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor,
    *,
    row_weight: Tensor | None,
    copies: int,
) -> HeadLoss:
    """Return the loss of every row and their weighted sum, differentiable in the student's hidden and weight.

    function: name of the caller, for messages. row_weight: float [N]; rows of weight 0 count as nothing, whatever their
    values. copies: number of arrays of the size of both heads' float32 logits that a chunk has in memory at once. total
    and rows are float32 (float64 for float64 hidden states). Raises ValueError on shapes that do not agree.
    """
    check_head(function, student_hidden_ND, student_weight_VD, "student ")
    check_head(function, teacher_hidden_NE, teacher_weight_UE, "teacher ")
    num_rows = len(student_hidden_ND)
    if num_rows != len(teacher_hidden_NE):
        raise ValueError(f"{function}: {num_rows} rows of the student, {len(teacher_hidden_NE)} of the teacher")
    weight_N = resolve_row_weights(function, row_weight, student_hidden_ND)
    # rows of weight 0 may not be finite, so they are left out of every product
    used = torch.arange(num_rows, device=weight_N.device) if row_weight is None else weight_N.nonzero()[:, 0]
    dtype = choose_product_dtype(student_hidden_ND)
    wide = torch.promote_types(dtype, torch.float32)

    def compute(student_CD: Tensor, weight_VD: Tensor, teacher_CE: Tensor, weight_UE: Tensor, rows_C: Tensor) -> Tensor:
        with torch.no_grad():
            target_CU = (teacher_CE @ weight_UE.T).to(wide)
        return chunk_loss((student_CD @ weight_VD.T).to(wide), target_CU, rows_C)

    parts = []
    with torch.autocast(student_hidden_ND.device.type, enabled=False):
        student, teacher = student_hidden_ND.to(dtype)[used], teacher_hidden_NE.detach().to(dtype)[used]
        heads = student_weight_VD.to(dtype), teacher_weight_UE.detach().to(dtype)
        size = rows_per_chunk(len(used), copies * (len(heads[0]) + len(heads[1])), student.device)
        for start in range(0, len(used), size):
            rows = slice(start, start + size)
            parts.append(
                checkpoint(compute, student[rows], heads[0], teacher[rows], heads[1], used[rows], use_reentrant=False)
            )
    nothing = student_hidden_ND[:0].sum(dtype=wide) + student_weight_VD[:0].sum(dtype=wide)  # gradients without rows
    losses = torch.cat(parts) if parts else weight_N[used]
    losses_N = torch.zeros(num_rows, dtype=wide, device=student.device)
    losses_N[used] = losses.detach()
    return HeadLoss((losses * weight_N[used]).sum() + nothing, losses_N)
