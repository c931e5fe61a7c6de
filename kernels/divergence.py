"""Divergences between a teacher's and a student's next-token distributions, without a [tokens, vocabulary] tensor.

The teacher is a head over its own hidden states; topk_divergence.py compares with log-probabilities that a teacher
stored. The formulas are in divergence_terms.py. torch sees one operator, genssd::linear_divergence.

Shapes:  N rows   C rows of a chunk   V student's vocabulary   U teacher's vocabulary   D student's width
         E teacher's width
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from genssd.kernels.divergence_terms import DivergenceKind, check_choice, divergence_terms, resolve_mixture
from genssd.kernels.head import (
    ChunkLogits,
    HeadLoss,
    check_head,
    check_positive,
    choose_product_dtype,
    compute_losses_and_gradients,
    iter_slices,
    make_fake_outputs,
    multiply_into,
    resolve_row_weights,
    rows_per_chunk,
    save_gradients,
    scale_gradients,
    squash,
    unsquash_gradient,
)
from genssd.kernels.options import VocabularyRule

if TYPE_CHECKING:
    from genssd.kernels.loss_launch_triton import LossConfiguration


def linear_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor,
    *,
    kind: DivergenceKind,
    beta: float = 0.5,
    alpha: float | Sequence[tuple[int, float]] = 0.1,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    row_weight: Tensor | None = None,
    vocabulary: VocabularyRule = "restrict",
) -> HeadLoss:
    """Return the divergence of every row and their weighted sum, differentiable in the student's hidden and weight.

    kind: see divergence_terms.py. row_weight: float [N]; rows of weight 0 count as nothing, even where their hidden
    states are not finite. beta (of jsd) lies in (0, 1), alpha (of the skew kinds) in [0, 1). alpha may also be given as
    runs of rows in order, the number of rows and the alpha of each, then in (0, 1). temperature divides the logits of
    both models. Heads that are padded to different widths share their first min(V, U) ids: with vocabulary "restrict"
    both softmaxes are taken over these alone; with "drop" each is taken over its own head, and the terms of the ids
    that only one head has are left out of the sum (which may then be negative). total and rows are float32 (float64 for
    float64 hidden states). Raises ValueError on shapes that do not agree and on an option out of range.
    """
    check_head("linear_divergence", student_hidden_ND, student_weight_VD, "student ")
    check_head("linear_divergence", teacher_hidden_NE, teacher_weight_UE, "teacher ")
    if student_hidden_ND.shape[0] != teacher_hidden_NE.shape[0]:
        raise ValueError(
            f"linear_divergence: {student_hidden_ND.shape[0]} rows of the student, {teacher_hidden_NE.shape[0]} of the "
            "teacher"
        )
    check_positive(
        "linear_divergence",
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
    )
    name, mixes, runs = _resolve_runs(kind, beta, alpha, len(student_hidden_ND))
    check_choice("linear_divergence", "vocabulary", vocabulary, get_args(VocabularyRule))
    row_weight_N = resolve_row_weights("linear_divergence", row_weight, student_hidden_ND)
    if vocabulary == "restrict":
        shared = min(student_weight_VD.shape[0], teacher_weight_UE.shape[0])
        student_weight_VD, teacher_weight_UE = student_weight_VD[:shared], teacher_weight_UE[:shared]
    grad = torch.is_grad_enabled()
    student_dtype, teacher_dtype = choose_product_dtype(student_hidden_ND), choose_product_dtype(teacher_hidden_NE)
    with torch.autocast(student_hidden_ND.device.type, enabled=False):
        total, rows, _, _ = _linear_divergence(
            student_hidden_ND.to(student_dtype),
            student_weight_VD,
            teacher_hidden_NE.detach().to(teacher_dtype),
            teacher_weight_UE.detach(),
            row_weight_N,
            name,
            mixes,
            runs,
            temperature,
            student_softcap,
            teacher_softcap,
            grad and student_hidden_ND.requires_grad,
            grad and student_weight_VD.requires_grad,
        )
    return HeadLoss(total, rows)


def _resolve_runs(
    kind: DivergenceKind, beta: float, alpha: float | Sequence[tuple[int, float]], num_rows: int
) -> tuple[str, list[float], list[int]]:
    """Return the kind, the teacher's weight in the mixture of each run of rows, and the numbers of rows of the runs."""
    if isinstance(alpha, int | float):
        name, mix = resolve_mixture("linear_divergence", kind, beta, alpha)
        return name, [mix], [num_rows]
    if sum(count for count, _ in alpha) != num_rows:
        raise ValueError(f"linear_divergence: the runs of alpha must have {num_rows} rows together")
    resolved = [resolve_mixture("linear_divergence", kind, beta, value) for _, value in alpha]
    if not kind.startswith("skew") or any(name != kind for name, _ in resolved):
        raise ValueError("linear_divergence: runs of alpha are for the skew kinds, each alpha in (0, 1)")
    return kind, [mix for _, mix in resolved], [count for count, _ in alpha]


def _divide_span(span: slice, mixes: Sequence[float], runs: Sequence[int]) -> Iterator[tuple[slice, float]]:
    """Yield the parts of a chunk of rows that have one mixture, relative to its start, and their mixtures."""
    begin = 0
    for mix, count in zip(mixes, runs, strict=True):
        first, last = max(span.start, begin), min(span.stop, begin + count)
        if first < last:
            yield slice(first - span.start, last - span.start), mix
        begin += count


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
) -> tuple[Tensor, Tensor]:
    """Return the losses [C] and their gradient in student_x, times row_weight, as [C, V] of the given dtype.

    student_x, teacher_x: products of hidden states and head, before softcap and temperature. student_x may be
    overwritten.
    """
    V, U = student_x_CV.shape[1], teacher_x_CU.shape[1]
    shared = min(V, U)
    losses_C = row_weight_C.new_empty(len(row_weight_C))
    for part in iter_slices(len(student_x_CV), V + U):
        x = student_x_CV[part]
        log_p = squash(x, temperature, student_softcap).log_softmax(1)
        log_q = squash(teacher_x_CU[part], temperature, teacher_softcap).log_softmax(1)[:, :shared]
        term, g = divergence_terms(log_p[:, :shared], log_q, kind, mix)
        p = log_p.exp_()
        if shared < V and kind in ("reverse_kl", "skew_reverse_kl"):
            # the constant in f matters where the sum leaves out entries of the student's softmax
            g = g + p[:, :shared]
        # all of the teacher's probabilities take part, so they sum to 1: with the exact sum the gradient is p - q
        mean = -torch.ones_like(row_weight_C[part]) if kind == "forward_kl" and shared == U else g.sum(1)
        dz = p.mul_(-mean[:, None])
        dz[:, :shared] += g
        x.copy_(unsquash_gradient(dz.mul_(row_weight_C[part, None]), x, temperature, student_softcap))
        losses_C[part] = term.sum(1)
    return losses_C, student_x_CV.to(dtype)


@torch.library.custom_op("genssd::linear_divergence", mutates_args=())
def _linear_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor,
    row_weight_N: Tensor,
    kind: str,
    mixes: list[float],
    runs: list[int],
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the total, the losses [N], and the gradients of hidden and weight (unrounded; empty if not wanted)."""
    configuration = None
    wide = torch.promote_types(teacher_hidden_NE.dtype, row_weight_N.dtype)
    if student_hidden_ND.is_cuda and wide == torch.float32:
        from genssd.kernels.loss_launch_triton import choose_configuration

        shared = min(len(student_weight_VD), len(teacher_weight_UE))
        shape = (shared, student_weight_VD.shape[1], teacher_weight_UE.shape[1])
        configuration = choose_configuration("divergence", student_hidden_ND.device, student_hidden_ND.dtype, shape)
    return compute_divergence(
        student_hidden_ND, student_weight_VD, teacher_hidden_NE, teacher_weight_UE, row_weight_N, kind, mixes, runs,
        temperature, student_softcap, teacher_softcap, want_hidden, want_weight, configuration=configuration,
    )  # fmt: skip


def compute_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor,
    row_weight_N: Tensor,
    kind: str,
    mixes: Sequence[float],
    runs: Sequence[int],
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
    *,
    configuration: LossConfiguration | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute genssd::linear_divergence. configuration: of the kernels on a CUDA device; None for plain torch.

    mixes, runs: the teacher's weight in the mixture of each run of rows, and its number of rows.
    """
    teacher_weight_UE = teacher_weight_UE.to(teacher_hidden_NE.dtype)
    both = student_weight_VD.shape[0] + teacher_weight_UE.shape[0]
    most = None if configuration is None else configuration.chunk_rows
    rows = rows_per_chunk(len(student_hidden_ND), both, student_hidden_ND.device, most=most)
    buffer_CU = torch.empty(
        min(rows, len(teacher_hidden_NE)),
        len(teacher_weight_UE),
        dtype=torch.promote_types(teacher_hidden_NE.dtype, torch.float32),
        device=teacher_hidden_NE.device,
    )
    multiply_student, multiply_teacher = (
        None if configuration is None else configuration.make_multiply(temperature, softcap)
        for softcap in (student_softcap, teacher_softcap)
    )

    def teacher_logits(span: slice) -> ChunkLogits:
        hidden_CE = teacher_hidden_NE[span].masked_fill(row_weight_N[span, None] == 0, 0)
        out_CU = buffer_CU[: len(hidden_CE)]
        if multiply_teacher is None:
            return ChunkLogits(multiply_into(hidden_CE, teacher_weight_UE, out=out_CU))
        return multiply_teacher(hidden_CE, teacher_weight_UE, out_CU)

    def row_loss(student: ChunkLogits, span: slice) -> tuple[Tensor, Tensor]:
        row_weight_C, teacher = row_weight_N[span], teacher_logits(span)

        def part_loss(part: slice, mix: float) -> tuple[Tensor, Tensor]:
            arguments = (
                student.x[part], teacher.x[part], row_weight_C[part], kind, mix, temperature, student_softcap,
                teacher_softcap, student_hidden_ND.dtype,
            )  # fmt: skip
            if configuration is None:
                return divergence_rows(*arguments)
            from genssd.kernels.divergence_triton import divergence_rows as loss_rows

            p, q = student.normalizer_C2, teacher.normalizer_C2
            known = None if p is None else p[part], None if q is None else q[part]
            return loss_rows(*arguments, normalizers=known, tiles=configuration.rows)

        chunk = slice(span.start, span.start + len(student.x))
        parts = [part_loss(part, mix) for part, mix in _divide_span(chunk, mixes, runs)]
        loss, dx = parts[0] if len(parts) == 1 else (torch.cat(values) for values in zip(*parts, strict=True))
        return loss.masked_fill(row_weight_C == 0, 0.0), dx

    losses, d_hidden, d_weight = compute_losses_and_gradients(
        row_loss,
        student_hidden_ND,
        student_weight_VD,
        row_weight_N,
        rows=rows,
        want_hidden=want_hidden,
        want_weight=want_weight,
        multiply=multiply_student,
    )
    return (losses * row_weight_N).sum(), losses, d_hidden, d_weight


@_linear_divergence.register_fake
def _(student_hidden_ND: Tensor, student_weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return make_fake_outputs(student_hidden_ND, student_weight_VD, *rest[-2:])


_linear_divergence.register_autograd(scale_gradients, setup_context=save_gradients)
