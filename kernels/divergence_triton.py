"""Triton kernel of `linear_divergence`: from a row of both models' logits to the row's divergence and its gradient.

One program computes one row. Its first pass yields both log-sum-exps, its second the divergence and the mean of f under
the student, its third the gradient. Where the mean is known (forward KL), the second pass yields both. Where the
products of both heads have taken the log-sum-exps (loss_logits_triton.py), the first pass is left out. The second runs
from the end of the row to its beginning, so that it begins with what the first has left in the L2 cache, and the third
like the first. The gradient overwrites the student's logits.

Shapes:  C rows of a chunk   V student's vocabulary   U teacher's vocabulary
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssd.kernels.rows_triton import RowTiles, lower_half, row_normalizer, squash, unsquash_gradient, upper_half

KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2, "skew_forward_kl": 3, "skew_reverse_kl": 4}
TILES = RowTiles(block=2048, num_warps=8)
"""Shipped configuration of the kernel."""


@triton.jit
def divergence_terms(log_p, log_q, mix, KIND: tl.constexpr):
    """Return every outcome's term of the divergence, and p f up to a constant in f; see divergence_terms.py."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    if KIND == 0:
        return tl.where(q > 0.0, q * (log_q - log_p), 0.0), -q
    elif KIND == 1:
        term = tl.where(p > 0.0, p * (log_p - log_q), 0.0)
        return term, term
    else:
        # log(mix q + (1 - mix) p), from logarithms: probabilities may underflow
        low, high = tl.minimum(log_p, log_q), tl.maximum(log_p, log_q)
        low_weight = tl.where(log_p < log_q, 1.0 - mix, mix)
        ratio = tl.where(low == -float("inf"), 0.0, tl.exp(low - high))
        log_m = high + tl.log((1.0 - low_weight) + low_weight * ratio)
        if KIND == 2:
            student = (1.0 - mix) * tl.where(p > 0.0, p * (log_p - log_m), 0.0)
            return mix * tl.where(q > 0.0, q * (log_q - log_m), 0.0) + student, student
        elif KIND == 3:
            term = tl.where(q > 0.0, q * (log_q - log_m), 0.0)
            return term, -(1.0 - mix) * tl.where(q > 0.0, q * tl.exp(log_p - log_m), 0.0)
        else:
            term = tl.where(p > 0.0, p * (log_p - log_m), 0.0)
            return term, term - (1.0 - mix) * tl.where(p > 0.0, p * tl.exp(log_p - log_m), 0.0)


@triton.jit
def _divergence_kernel(
    student, teacher, row_weight, loss, dx,  # [C, V] [C, U] [C] [C] [C, V], the upper half (MEAN_KNOWN) or lower half
    student_normalizer, teacher_normalizer,  # [C, 2] [C, 2]
    C, V, U, stride_student, stride_teacher, stride_dx, mix, scale, student_softcap, teacher_softcap,
    KIND: tl.constexpr, MEAN_KNOWN: tl.constexpr, BLOCK: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr, STUDENT_KNOWN: tl.constexpr, TEACHER_KNOWN: tl.constexpr,
):  # fmt: skip
    """STUDENT_KNOWN, TEACHER_KNOWN: normalizers are known, and logits capped; then the first pass is left out."""
    CAP_STUDENT: tl.constexpr = STUDENT_SOFTCAP and not STUDENT_KNOWN
    CAP_TEACHER: tl.constexpr = TEACHER_SOFTCAP and not TEACHER_KNOWN
    for number in range(tl.program_id(0), C, tl.num_programs(0)):
        row = tl.zeros([], tl.int64) + number
        student_row, teacher_row = student + row * stride_student, teacher + row * stride_teacher
        dx_row = dx + row * stride_dx
        weight = tl.load(row_weight + row)
        if STUDENT_KNOWN:
            peak_p, sum_p = tl.load(student_normalizer + 2 * row), tl.load(student_normalizer + 2 * row + 1)
        else:
            peak_p, sum_p = row_normalizer(student_row, V, scale, student_softcap, BLOCK, STUDENT_SOFTCAP)
        if TEACHER_KNOWN:
            peak_q, sum_q = tl.load(teacher_normalizer + 2 * row), tl.load(teacher_normalizer + 2 * row + 1)
        else:
            peak_q, sum_q = row_normalizer(teacher_row, U, scale, teacher_softcap, BLOCK, TEACHER_SOFTCAP)
        shared = tl.minimum(V, U)
        # a constant in f matters where the sum leaves out entries of the student's softmax
        constant = tl.where((shared < V) & (KIND == 1 or KIND == 4), 1.0, 0.0)
        lane = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        mean = tl.zeros([BLOCK], tl.float32)
        blocks = tl.cdiv(V, BLOCK)
        for i in range(0, blocks):
            v = (blocks - 1 - i) * BLOCK + lane
            kept = v < shared
            z = squash(tl.load(student_row + v, mask=v < V, other=0.0), scale, student_softcap, CAP_STUDENT)
            log_q = squash(tl.load(teacher_row + v, mask=kept, other=0.0), scale, teacher_softcap, CAP_TEACHER)
            log_p, log_q = z - peak_p - sum_p, log_q - peak_q - sum_q
            term, g = divergence_terms(log_p, log_q, mix, KIND)
            total += tl.where(kept, term, 0.0)
            if MEAN_KNOWN:
                # all of the teacher's probabilities take part, so they sum to 1: with that sum the gradient is p - q
                dz = tl.where(kept, g, 0.0) + tl.exp(log_p)
                out = unsquash_gradient(dz * (weight * scale), z, scale, student_softcap, STUDENT_SOFTCAP)
                tl.debug_barrier()  # all threads have read the block's entries before one is overwritten
                tl.store(dx_row + v, out.to(dx.dtype.element_ty), mask=v < V)
            else:
                mean += tl.where(kept, g + constant * tl.exp(log_p), 0.0)
        tl.store(loss + row, tl.sum(total, 0))
        if not MEAN_KNOWN:
            f_mean = tl.sum(mean, 0)
            for start in range(0, V, BLOCK):
                v = start + lane
                kept = v < shared
                z = squash(tl.load(student_row + v, mask=v < V, other=0.0), scale, student_softcap, CAP_STUDENT)
                log_q = squash(tl.load(teacher_row + v, mask=kept, other=0.0), scale, teacher_softcap, CAP_TEACHER)
                log_p = z - peak_p - sum_p
                p = tl.exp(log_p)
                _, g = divergence_terms(log_p, log_q - peak_q - sum_q, mix, KIND)
                dz = tl.where(kept, g + constant * p, 0.0) - p * f_mean
                out = unsquash_gradient(dz * (weight * scale), z, scale, student_softcap, STUDENT_SOFTCAP)
                tl.debug_barrier()
                tl.store(dx_row + v, out.to(dx.dtype.element_ty), mask=v < V)


def divergence_rows(
    student_x_CV: Tensor,
    teacher_x_CU: Tensor,
    row_weight_C: Tensor,
    kind: str,
    mix: float,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    dtype: torch.dtype,
    *,
    normalizers: tuple[Tensor | None, Tensor | None] = (None, None),
    tiles: RowTiles = TILES,
) -> tuple[Tensor, Tensor]:
    """Compute `divergence.divergence_rows` for float32 logits on a CUDA device; the gradient overwrites student_x.

    normalizers: those of the student's and of the teacher's logits, float32 [C, 2] each, of
    `loss_logits_triton.write_normalized_logits`, which has capped the logits; None where the kernel computes them.
    """
    (C, V), U = student_x_CV.shape, teacher_x_CU.shape[1]
    loss_C = torch.empty(C, dtype=torch.float32, device=student_x_CV.device)
    mean_known = kind == "forward_kl" and U <= V
    dx_CV = (upper_half if mean_known else lower_half)(student_x_CV, dtype)
    student_known, teacher_known = (value is not None for value in normalizers)
    student_normalizer, teacher_normalizer = (loss_C if value is None else value for value in normalizers)
    _divergence_kernel[(min(C, tiles.programs),)](
        student_x_CV, teacher_x_CU, row_weight_C, loss_C, dx_CV, student_normalizer, teacher_normalizer, C, V, U,
        student_x_CV.stride(0), teacher_x_CU.stride(0), dx_CV.stride(0),
        mix, 1.0 / temperature, student_softcap or 1.0, teacher_softcap or 1.0,
        KIND=KINDS[kind], MEAN_KNOWN=mean_known, BLOCK=tiles.block,
        STUDENT_SOFTCAP=student_softcap is not None, TEACHER_SOFTCAP=teacher_softcap is not None,
        STUDENT_KNOWN=student_known, TEACHER_KNOWN=teacher_known, num_warps=tiles.num_warps,
    )  # fmt: skip
    return loss_C, dx_CV
