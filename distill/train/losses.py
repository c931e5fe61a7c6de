"""The loss of a training over the completion tokens of a batch; no [tokens, vocabulary] tensor is ever built.

    (1 - kd_ratio) * cross-entropy of the data's tokens + kd_ratio * divergence from the teacher's distributions

The teacher's distributions come from a teacher in memory (its hidden states and head), or from the top k that
`genssd select` stored with the data. Divergences, with q the teacher and p the student: forward_kl KL(q|p), reverse_kl
KL(p|q), jsd beta KL(q|m) + (1 - beta) KL(p|m) with m = beta q + (1 - beta) p, skew_forward_kl KL(q | alpha q +
(1 - alpha) p), skew_reverse_kl KL(p | (1 - alpha) q + alpha p). `temperature` divides both models' logits; the loss is
not multiplied by its square.

With `kd_standardize` forward KL is taken between standardised logits and multiplied by the square of `temperature`
(2403.01427).

distillm2 is for pairs (rows with `chosen` and `rejected`): (2 - beta) skew_forward_kl on the chosen completions, beta
skew_reverse_kl on the rejected ones (DistiLLM-2; its alpha per sample is not implemented). Other rows count as chosen.
The cross-entropy runs over the chosen completions; like every term it is divided by the weight of all tokens, including
those of the rejected completions.

On completions that the student wrote itself (on-policy) the loss is the divergence alone. There reverse KL can also be
estimated from the sampled tokens: sampled_reverse_kl has the value log p - log q and the gradient (log p - log q) grad
log p, whose mean over samples is that of KL(p|q) (on-policy distillation).

Shapes:  M completion tokens   D hidden size   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from genssd.distill.data.examples import Example
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.settings import ModelPath
from genssd.distill.train.key_attention import KeyAttentionOptions
from genssd.engine.errors import InputError
from genssd.engine.options_check import check_types
from genssd.kernels.cross_entropy import linear_cross_entropy
from genssd.kernels.divergence import VocabularyRule, linear_divergence
from genssd.kernels.head import COLDEST
from genssd.kernels.logprob import TopK, linear_logprob
from genssd.kernels.standardized import linear_standardized_kl
from genssd.kernels.topk_divergence import TailRule, topk_divergence

KdLoss = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "sampled_reverse_kl", "distillm2"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """Options of the training loss."""

    NEEDS: ClassVar[Needs] = {
        **{
            name: Need(lambda o: o.uses_divergence, "a kd_ratio above 0")
            for name in ("kd_loss", "kd_standardize", "kd_topk", "mask_special_tokens", "temperature")
        },
        "beta": Need(
            lambda o: o.uses_divergence and o.kd_loss in ("jsd", "distillm2"),
            "kd_loss jsd or distillm2, and a kd_ratio above 0",
        ),
        "alpha": Need(
            lambda o: o.uses_divergence and o.kd_loss in ("skew_forward_kl", "skew_reverse_kl", "distillm2"),
            "kd_loss skew_forward_kl, skew_reverse_kl or distillm2, and a kd_ratio above 0",
        ),
        "kd_tail": Need(
            lambda o: o.uses_divergence and (o.uses_rows or o.kd_topk > 0),
            "a kd_ratio above 0 with the top k of the rows, or with kd_topk",
        ),
        "kd_vocabulary": Need(
            lambda o: o.uses_divergence and o.uses_teacher and not o.kd_topk and not o.kd_standardize,
            "a kd_ratio above 0 with a teacher in memory, without kd_topk and kd_standardize",
        ),
    }

    teacher_model_name_or_path: ModelPath[str | None] = None
    """Hub id or local directory of a teacher that is loaded next to the student, for kd_ratio > 0. None: the
    teacher's top k is read from the rows (`select --teacher-topk`)."""
    kd_ratio: float = 0.0
    """Weight of the divergence from the teacher in the loss, in [0, 1]; that of the cross-entropy is 1 - kd_ratio."""
    kd_loss: KdLoss = "forward_kl"
    """Divergence of the student p from the teacher q: forward_kl is KL(q|p), reverse_kl is KL(p|q);
    distill/train/losses.py defines all of them."""
    kd_standardize: bool = False
    """Take the divergence between standardised logits; needs kd_loss forward_kl and a teacher in memory."""
    kd_topk: int = 0
    """Number of most likely tokens of the teacher in memory over which the divergence is taken; 0: the whole
    vocabulary. With kd_loss reverse_kl and kd_tail renormalize this is the local support matching of 2603.25562."""
    mask_special_tokens: bool = False
    """Leave the positions of special tokens out of the divergence; the two models may use these tokens differently."""
    key_attention: KeyAttentionOptions = field(default_factory=KeyAttentionOptions)
    """Loss on the difference between the student's and the teacher's attention to key words, added to the other losses
    (MoLSAKI); needs a teacher in memory."""
    lmbda: float = 0.0
    """Probability that an optimizer step is on-policy: the student writes the completions itself (GKD)."""
    beta: float = 0.5
    """Mixing weight of jsd, in (0, 1): near 0 it is like forward KL, near 1 like reverse KL. With distillm2: the
    weight of the rejected completions, in [0, 2]."""
    alpha: float = 0.1
    """Mixing weight alpha of the skewed KL divergences, in [0, 1)."""
    temperature: float = 1.0
    """Temperature that divides both models' logits in the divergence."""
    kd_tail: TailRule = "bucket"
    """Treatment of the tokens outside the top k: bucket joins them into one outcome, renormalize leaves them out and
    renormalises both distributions."""
    kd_vocabulary: VocabularyRule = "restrict"
    """Vocabulary of the two softmaxes where the heads are padded to different widths: restrict takes both over the ids
    that both models have, drop takes each over its own ids."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("kd_ratio", "lmbda"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        if self.lmbda and not self.uses_teacher:
            raise InputError("lmbda: what the student writes is judged by a teacher; give a teacher and a kd_ratio")
        if self.kd_topk < 0 or (self.kd_topk and not self.uses_teacher):
            raise InputError("kd_topk is at least 0, and of a teacher in memory: give --teacher-model-name-or-path")
        if self.kd_loss == "sampled_reverse_kl" and (self.kd_topk or self.lmbda < 1.0):
            raise InputError(
                "sampled_reverse_kl is an estimate over the student's own draws: it needs lmbda 1, no kd_topk"
            )
        if self.kd_standardize and (self.kd_loss != "forward_kl" or self.kd_topk or not self.uses_teacher):
            raise InputError("kd_standardize is forward_kl against a teacher in memory, over the whole vocabulary")
        pairs = self.kd_loss == "distillm2"
        if pairs and (not 0.0 <= self.beta <= 2.0 or self.kd_topk or self.lmbda or not self.uses_teacher):
            raise InputError("distillm2 needs a teacher in memory, beta in [0, 2], no kd_topk and no lmbda")
        if self.kd_loss == "jsd" and not 0.0 < self.beta < 1.0:
            raise InputError(f"beta must lie in (0, 1), not {self.beta}; its limits are forward_kl and reverse_kl")
        if not 0.0 <= self.alpha < 1.0:
            raise InputError(f"alpha must lie in [0, 1), not {self.alpha}")
        if self.temperature < COLDEST:
            raise InputError(f"temperature must be at least {COLDEST:g}, not {self.temperature}")
        if self.teacher_model_name_or_path is not None and not self.uses_teacher:
            raise InputError("a teacher was given, but kd_ratio is 0: give --kd-ratio, up to 1")
        if self.key_attention.weight and not self.uses_teacher:
            raise InputError("key_attention needs a teacher in memory: give --teacher-model-name-or-path")
        from_rows = self.kd_ratio > 0.0 and self.teacher_model_name_or_path is None
        if from_rows and self.temperature != 1.0 and self.kd_tail == "bucket":
            raise InputError(
                "the rows' top k were taken at temperature 1 and say nothing of the tail at another: use "
                "--kd-tail renormalize, temperature 1, or a teacher in memory"
            )

    @property
    def uses_divergence(self) -> bool:
        """Whether the loss has a divergence from the teacher. That of an on-policy step is nothing else."""
        return self.kd_ratio > 0.0 or self.lmbda > 0.0

    @property
    def uses_rows(self) -> bool:
        """Whether the teacher's top k is read from the rows of the data."""
        return self.kd_ratio > 0.0 and self.teacher_model_name_or_path is None

    @property
    def uses_teacher(self) -> bool:
        """Whether a teacher is loaded next to the student."""
        needs_teacher = self.kd_ratio > 0.0 or self.key_attention.weight > 0.0
        return needs_teacher and self.teacher_model_name_or_path is not None


class Head(NamedTuple):
    """Hidden states that predict the completion tokens, and the head's weight that turns them into logits."""

    hidden_MD: Tensor
    weight_VD: Tensor
    softcap: float | None = None
    """Bound of the logits; None without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionTokens:
    """Completion tokens of a forward pass and how each of them counts in the loss."""

    target_M: Tensor
    """Token ids, int64 [M]."""
    weight_M: Tensor
    """Weight of each token in the loss, float [M]."""
    rejected_M: Tensor | None = None
    """Whether a token belongs to a rejected completion, bool [M]; such a token has no cross-entropy. None: no token
    does."""
    on_policy: bool = False
    """Whether the student under training wrote the completions."""


class LossSums(NamedTuple):
    """Sums of the losses of a forward pass."""

    total: Tensor
    """Weighted sum of the loss over the tokens, differentiable."""
    cross_entropy: Tensor | None
    """Weighted sum of the cross-entropy, not multiplied by 1 - kd_ratio; None where it is not computed."""
    divergence: Tensor | None
    """Weighted sum of the divergence, not multiplied by kd_ratio; None where it is not computed."""
    attention: Tensor | None = None
    """Sum over the examples of the loss on attention to key words, differentiable, not multiplied by its weight and not
    a part of `total`; None where it is not computed."""


def compute_loss(
    options: LossOptions,
    student: Head,
    tokens: CompletionTokens,
    teacher: Head | TopK | None = None,
    *,
    special_ids: Sequence[int] = (),
) -> LossSums:
    """Compute the loss of M completion tokens.

    teacher: its states and head, or its top k, for the same tokens. special_ids: see `mask_special_tokens`.
    """
    total = student.hidden_MD.new_zeros((), dtype=torch.float32)
    cross_entropy = divergence = None
    kd_ratio = 1.0 if tokens.on_policy else options.kd_ratio
    if kd_ratio < 1.0:
        weight_M = tokens.weight_M
        if tokens.rejected_M is not None:
            weight_M = weight_M.masked_fill(tokens.rejected_M, 0.0)
        sums = linear_cross_entropy(
            student.hidden_MD, student.weight_VD, tokens.target_M, row_weight=weight_M, softcap=student.softcap
        )
        total = total + (1.0 - kd_ratio) * sums.total
        cross_entropy = sums.total.detach()
    if kd_ratio > 0.0:
        assert teacher is not None
        if options.mask_special_tokens and special_ids:
            special = torch.isin(tokens.target_M, torch.tensor(list(special_ids), device=tokens.target_M.device))
            tokens = replace(tokens, weight_M=tokens.weight_M.masked_fill(special, 0.0))
        weighted_sum = _sum_divergence(options, student, tokens, teacher)
        total = total + kd_ratio * weighted_sum
        divergence = weighted_sum.detach()
    return LossSums(total, cross_entropy, divergence)


def _sum_divergence(options: LossOptions, student: Head, tokens: CompletionTokens, teacher: Head | TopK) -> Tensor:
    """Return the weighted sum of the divergence over the tokens."""
    kind = options.kd_loss
    if isinstance(teacher, Head) and options.kd_standardize:
        temperature, weight_M = options.temperature, tokens.weight_M
        return linear_standardized_kl(*student[:2], *teacher[:2], temperature=temperature, row_weight=weight_M).total
    if kind == "distillm2":
        assert isinstance(teacher, Head)
        return _sum_pair_divergence(options, student, tokens, teacher)
    if kind == "sampled_reverse_kl":
        if tokens.on_policy:
            assert isinstance(teacher, Head)
            return _sum_sampled_reverse_kl(student, tokens, teacher, options.temperature)
        kind = "reverse_kl"  # held-out completions are not samples of the student: use the divergence itself
    arguments: dict[str, Any] = {
        "kind": kind,
        "student_softcap": student.softcap,
        "beta": options.beta,
        "alpha": options.alpha,
        "temperature": options.temperature,
        "row_weight": tokens.weight_M,
    }
    if isinstance(teacher, Head) and options.kd_topk:
        # only the top k is used, so any valid target ids will do
        unused = torch.zeros_like(tokens.target_M)
        with torch.no_grad():
            k = min(options.kd_topk, len(teacher.weight_VD))
            top = linear_logprob(
                *teacher[:2], unused, temperature=options.temperature, softcap=teacher.softcap, topk=k
            ).topk
        assert top is not None
        return topk_divergence(*student[:2], top.ids, top.logprob, tail=options.kd_tail, **arguments).total
    if isinstance(teacher, TopK):
        top = _apply_temperature(teacher, options)
        return topk_divergence(*student[:2], top.ids, top.logprob, tail=options.kd_tail, **arguments).total
    return linear_divergence(
        *student[:2], *teacher[:2], vocabulary=options.kd_vocabulary, teacher_softcap=teacher.softcap, **arguments
    ).total


def _sum_pair_divergence(options: LossOptions, student: Head, tokens: CompletionTokens, teacher: Head) -> Tensor:
    """Return the sum of the skewed forward KL of chosen tokens and the skewed reverse KL of rejected tokens."""
    weight_M, rejected_M = tokens.weight_M, tokens.rejected_M
    rejected = torch.zeros_like(weight_M, dtype=torch.bool) if rejected_M is None else rejected_M
    total = weight_M.new_zeros(())
    for kind, factor, included in (
        ("skew_forward_kl", 2.0 - options.beta, ~rejected),
        ("skew_reverse_kl", options.beta, rejected),
    ):
        if bool(included.any()) and factor:
            total = (
                total
                + linear_divergence(
                    *student[:2],
                    *teacher[:2],
                    student_softcap=student.softcap,
                    teacher_softcap=teacher.softcap,
                    kind=kind,  # type: ignore[arg-type]
                    alpha=options.alpha,
                    temperature=options.temperature,
                    row_weight=(factor * weight_M).masked_fill(~included, 0.0),
                    vocabulary=options.kd_vocabulary,
                ).total
            )
    return total


def _sum_sampled_reverse_kl(student: Head, tokens: CompletionTokens, teacher: Head, temperature: float) -> Tensor:
    """Return the sum over the tokens of w (log p - log q), with the gradient of w stop(log p - log q) log p."""
    log_p = linear_logprob(*student[:2], tokens.target_M, temperature=temperature, softcap=student.softcap).logprob
    with torch.no_grad():
        advantage = (
            log_p
            - linear_logprob(*teacher[:2], tokens.target_M, temperature=temperature, softcap=teacher.softcap).logprob
        )
    # a token of weight 0 adds nothing, even if its value is not finite
    counted = tokens.weight_M != 0.0
    surrogate = torch.where(counted, tokens.weight_M * advantage * log_p, 0.0).sum()
    value = torch.where(counted, tokens.weight_M * advantage, 0.0).sum()
    return value + surrogate - surrogate.detach()


def _apply_temperature(top: TopK, options: LossOptions) -> TopK:
    """Return the top k renormalised at the temperature of the divergence."""
    if options.temperature == 1.0:
        return top
    return TopK(top.ids, (top.logprob / options.temperature).log_softmax(1))


def read_topk(examples: Sequence[Example]) -> TopK:
    """Read and concatenate the teacher's top k of all examples; rows with a smaller k are padded with id -1."""
    parts = [example.topk.read() for example in examples if example.topk is not None]
    most = max(part.ids.shape[1] for part in parts)
    padded = [
        TopK(
            torch.nn.functional.pad(part.ids, (0, most - part.ids.shape[1]), value=-1),
            torch.nn.functional.pad(part.logprob, (0, most - part.logprob.shape[1]), value=-math.inf),
        )
        for part in parts
    ]
    return TopK.concatenate(padded)
