"""What training minimises, over the completion tokens of a batch; never a [tokens, vocabulary] tensor.

    (1 - kd_ratio) * cross-entropy of the data's tokens + kd_ratio * divergence from the teacher's distributions

The teacher is in memory (its hidden states and head), or the top k that it said while the data was written. Directions,
with q the teacher and p the student: forward_kl KL(q|p), reverse_kl KL(p|q), jsd beta KL(q|m) + (1 - beta) KL(p|m) with
m = beta q + (1 - beta) p, skew_forward_kl KL(q | alpha q + (1 - alpha) p), skew_reverse_kl KL(p | (1 - alpha) q +
alpha p). `temperature` divides both models' logits; nothing is multiplied by its square.

With `kd_standardize` forward KL is taken between standardised logits and multiplied by the square of `temperature`
(2403.01427).

distillm2 is for pairs (rows with `chosen` and `rejected`): (2 - beta) skew_forward_kl on what is chosen, beta
skew_reverse_kl on what is rejected (DistiLLM-2; its alpha per sample is not built). Other rows count as chosen. The
cross-entropy is of the chosen; like everything it is divided by the weight of all tokens, those of the rejected, too.

On completions that the student wrote itself the loss is the divergence alone. There reverse KL can also be estimated
from the drawn tokens: sampled_reverse_kl has the value log p - log q and the gradient (log p - log q) grad log p, whose
mean over draws is that of KL(p|q) (on-policy distillation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from genssd.distill.data.examples import Example
from genssd.distill.train.key_attention import KeyAttentionOptions
from genssd.engine.errors import InputError
from genssd.kernels.cross_entropy import linear_cross_entropy
from genssd.kernels.divergence import VocabularyRule, linear_divergence
from genssd.kernels.logprob import TopK, linear_logprob
from genssd.kernels.standardized import linear_standardized_kl
from genssd.kernels.topk_divergence import TailRule, topk_divergence

Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "sampled_reverse_kl", "distillm2"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """What is minimised."""

    teacher_model_name_or_path: str | None = None
    """A teacher to load beside the student, for kd_ratio > 0. None: the top k in the rows (`select --teacher-topk`)."""
    kd_ratio: float = 0.0
    """Share of the loss that is the divergence from the teacher; the rest is cross-entropy."""
    kd_loss: Divergence = "forward_kl"
    """Teacher q, student p: forward_kl is KL(q|p), reverse_kl is KL(p|q); distill/losses.py has all of them."""
    kd_standardize: bool = False
    """Compare standardised logits; with kd_loss forward_kl and a teacher in memory."""
    kd_topk: int = 0
    """Compare over so many of the most likely tokens of the teacher in memory; 0: over the vocabulary. With kd_loss
    reverse_kl and kd_tail renormalize this is the local support matching of 2603.25562."""
    mask_special_tokens: bool = False
    """The divergence leaves out the positions of special tokens, which the two models may use differently."""
    key_attention: KeyAttentionOptions = field(default_factory=KeyAttentionOptions)
    """Learn where the teacher in memory looks, beside everything else (MoLSAKI)."""
    lmbda: float = 0.0
    """Share of the optimizer steps whose completions the student writes itself (GKD)."""
    beta: float = 0.5
    """Of jsd: 0 towards forward KL, 1 towards reverse KL. Of distillm2: the weight of what is rejected, in [0, 2]."""
    alpha: float = 0.1
    """Of the skew divergences."""
    temperature: float = 1.0
    """Of the divergence."""
    kd_tail: TailRule = "bucket"
    """What becomes of the tokens outside the top k: one outcome, or both sides renormalised without them."""
    kd_vocabulary: VocabularyRule = "restrict"
    """Heads padded to different widths: both over the ids they share, or each over its own."""

    def __post_init__(self) -> None:
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
        if not 0.0 < self.temperature < math.inf:
            raise InputError(f"temperature must be positive, not {self.temperature}")
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
    def uses_rows(self) -> bool:
        """Whether the teacher's top k come with the data."""
        return self.kd_ratio > 0.0 and self.teacher_model_name_or_path is None

    @property
    def uses_teacher(self) -> bool:
        """Whether a teacher runs beside the student."""
        wanted = self.kd_ratio > 0.0 or self.key_attention.weight > 0.0
        return wanted and self.teacher_model_name_or_path is not None


class Head(NamedTuple):
    """A model's states in front of the completion tokens, and the weight that turns them into logits."""

    hidden_MD: Tensor
    weight_VD: Tensor


class Loss(NamedTuple):
    """total: the weighted sum over the tokens, differentiable. cross_entropy, divergence: its parts, without ratio;
    None where they are not computed. attention: beside it, the sum over the examples, differentiable, unweighted."""

    total: Tensor
    cross_entropy: Tensor | None
    divergence: Tensor | None
    attention: Tensor | None = None


def loss_of(
    options: LossOptions,
    student: Head,
    target_M: Tensor,
    weight_M: Tensor,
    teacher: Head | TopK | None = None,
    *,
    rejected_M: Tensor | None = None,
    special_ids: Sequence[int] = (),
    own: bool = False,
) -> Loss:
    """The loss of M completion tokens. teacher: its head and states, or its top k, for the same tokens. rejected: bool,
    of the tokens of rejected completions; their cross-entropy does not count. special_ids: see `mask_special_tokens`.
    own: whether the student wrote the completions."""
    total = student.hidden_MD.new_zeros((), dtype=torch.float32)
    cross_entropy = divergence = None
    kd_ratio = 1.0 if own else options.kd_ratio
    if kd_ratio < 1.0:
        learnt = weight_M if rejected_M is None else weight_M.masked_fill(rejected_M, 0.0)
        of_data = linear_cross_entropy(student.hidden_MD, student.weight_VD, target_M, row_weight=learnt).total
        total = total + (1.0 - kd_ratio) * of_data
        cross_entropy = of_data.detach()
    if kd_ratio > 0.0:
        assert teacher is not None
        if options.mask_special_tokens and special_ids:
            special = torch.isin(target_M, torch.tensor(list(special_ids), device=target_M.device))
            weight_M = weight_M.masked_fill(special, 0.0)
        found = _divergence(options, student, target_M, weight_M, teacher, rejected_M, own)
        total = total + kd_ratio * found
        divergence = found.detach()
    return Loss(total, cross_entropy, divergence)


def _divergence(
    options: LossOptions,
    student: Head,
    target_M: Tensor,
    weight_M: Tensor,
    teacher: Head | TopK,
    rejected_M: Tensor | None,
    own: bool,
) -> Tensor:
    """The weighted sum over the tokens."""
    kind = options.kd_loss
    if isinstance(teacher, Head) and options.kd_standardize:
        found = linear_standardized_kl(*student, *teacher, temperature=options.temperature, row_weight=weight_M)
        return found.total
    if kind == "distillm2":
        assert isinstance(teacher, Head)
        return _pairs(options, student, weight_M, teacher, rejected_M)
    if kind == "sampled_reverse_kl":
        if own:
            assert isinstance(teacher, Head)
            return _sampled(student, target_M, weight_M, teacher, options.temperature)
        kind = "reverse_kl"  # held-out data are no draws: what the estimate stands for
    shared: dict[str, Any] = {
        "kind": kind,
        "beta": options.beta,
        "alpha": options.alpha,
        "temperature": options.temperature,
        "row_weight": weight_M,
    }
    if isinstance(teacher, Head) and options.kd_topk:
        # the targets are not asked about: any valid ones will do
        asked = torch.zeros_like(target_M)
        with torch.no_grad():
            most = min(options.kd_topk, len(teacher.weight_VD))
            top = linear_logprob(*teacher, asked, temperature=options.temperature, topk=most).topk
        assert top is not None
        return topk_divergence(*student, top.ids, top.logprob, tail=options.kd_tail, **shared).total
    if isinstance(teacher, TopK):
        top = _at_temperature(teacher, options)
        return topk_divergence(*student, top.ids, top.logprob, tail=options.kd_tail, **shared).total
    return linear_divergence(*student, *teacher, vocabulary=options.kd_vocabulary, **shared).total


def _pairs(options: LossOptions, student: Head, weight_M: Tensor, teacher: Head, rejected_M: Tensor | None) -> Tensor:
    """Towards the teacher on what is chosen, away from what the student overrates on what is rejected."""
    rejected = torch.zeros_like(weight_M, dtype=torch.bool) if rejected_M is None else rejected_M
    total = weight_M.new_zeros(())
    for kind, share, part in (
        ("skew_forward_kl", 2.0 - options.beta, ~rejected),
        ("skew_reverse_kl", options.beta, rejected),
    ):
        if bool(part.any()) and share:
            total = (
                total
                + linear_divergence(
                    *student,
                    *teacher,
                    kind=kind,  # type: ignore[arg-type]
                    alpha=options.alpha,
                    temperature=options.temperature,
                    row_weight=(share * weight_M).masked_fill(~part, 0.0),
                    vocabulary=options.kd_vocabulary,
                ).total
            )
    return total


def _sampled(student: Head, target_M: Tensor, weight_M: Tensor, teacher: Head, temperature: float) -> Tensor:
    """Of every token w (log p - log q); its gradient is that of w stop(log p - log q) log p."""
    log_p = linear_logprob(*student, target_M, temperature=temperature).logprob
    with torch.no_grad():
        advantage = log_p - linear_logprob(*teacher, target_M, temperature=temperature).logprob
    # where the weight is 0 nothing counts, whatever the value
    used = weight_M != 0.0
    surrogate = torch.where(used, weight_M * advantage * log_p, 0.0).sum()
    value = torch.where(used, weight_M * advantage, 0.0).sum()
    return value + surrogate - surrogate.detach()


def _at_temperature(top: TopK, options: LossOptions) -> TopK:
    """The top k as the teacher would have said them at this temperature, among themselves."""
    if options.temperature == 1.0:
        return top
    return TopK(top.ids, (top.logprob / options.temperature).log_softmax(1))


def topk_of(examples: Sequence[Example]) -> TopK:
    """The rows' top k, behind each other; rows with fewer are filled with places that count nothing."""
    parts = [example.topk.read() for example in examples if example.topk is not None]
    most = max(part.ids.shape[1] for part in parts)
    wide = [
        TopK(
            torch.nn.functional.pad(part.ids, (0, most - part.ids.shape[1]), value=-1),
            torch.nn.functional.pad(part.logprob, (0, most - part.logprob.shape[1]), value=-math.inf),
        )
        for part in parts
    ]
    return TopK.concatenate(wide)
