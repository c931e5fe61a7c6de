"""The options of the training loss, and what they cannot be combined with. losses.py defines the losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import ModelPath
from genssd.distill.train.key_attention_options import KeyAttentionOptions
from genssd.distill.train.token_weight_options import TokenWeightOptions
from genssd.engine.checkpoints.address import is_url
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.kernels.options import COLDEST, PARTIAL_SUMS, TailRule, VocabularyRule

SMALLEST_ALPHA = 0.01
"""Smallest alpha of a completion, where each has its own."""

KdLoss = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "sampled_reverse_kl",
    "distillm2",
    "span_kl",
    "uld",
]
SPAN_LOSSES = frozenset(("span_kl", "uld"))
"""Losses over spans of text, for which the two models need nothing in common but the text."""


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
        "adaptive_alpha": Need(
            lambda o: o.uses_divergence and o.kd_loss in ("skew_forward_kl", "skew_reverse_kl", "distillm2"),
            "kd_loss skew_forward_kl, skew_reverse_kl or distillm2, and a kd_ratio above 0",
        ),
        "kd_topk_of": Need(lambda o: o.uses_divergence and o.kd_topk > 0, "a kd_ratio above 0, and kd_topk"),
        "kd_tail": Need(
            lambda o: o.uses_divergence and (o.uses_rows or o.kd_topk > 0),
            "a kd_ratio above 0 with the top k of the rows, or with kd_topk",
        ),
        "kd_vocabulary": Need(
            lambda o: (
                o.uses_divergence
                and o.uses_teacher
                and not o.kd_topk
                and not o.kd_standardize
                and o.kd_loss not in SPAN_LOSSES
            ),
            "a kd_ratio above 0 with a teacher in memory, without kd_topk, kd_standardize, span_kl and uld",
        ),
    }

    teacher_model_name_or_path: ModelPath[str | None] = None
    """Hub id or local directory of a teacher that is loaded next to the student, for kd_ratio > 0. None: the
    teacher's top k is read from the rows (`select --teacher-topk`)."""
    kd_ratio: float = 0.0
    """Weight of the divergence from the teacher in the loss, in [0, 1]; that of the cross-entropy is 1 - kd_ratio."""
    kd_loss: KdLoss = "forward_kl"
    """Divergence of the student p from the teacher q: forward_kl is KL(q|p), reverse_kl is KL(p|q);
    distill/train/losses.py defines all of them. A teacher with another tokenizer needs span_kl, uld or
    sampled_reverse_kl."""
    kd_standardize: bool = False
    """Take the divergence between standardised logits; needs kd_loss forward_kl and a teacher in memory."""
    kd_topk: int = 0
    """Number of most likely tokens over which the divergence is taken, with a teacher in memory; 0: the whole
    vocabulary. With kd_loss reverse_kl and kd_tail renormalize this is the local support matching of 2603.25562."""
    kd_topk_of: Literal["teacher", "student"] = "teacher"
    """Model whose kd_topk most likely tokens are taken. student needs kd_loss reverse_kl, whose terms are largest at
    the student's own likely tokens, and a teacher in memory, which is asked for its probabilities of them."""
    mask_special_tokens: bool = False
    """Leave the positions of special tokens out of the divergence; the two models may use these tokens differently."""
    key_attention: KeyAttentionOptions = field(default_factory=KeyAttentionOptions)
    """Loss on the difference between the student's and the teacher's attention to key words, added to the other losses
    (MoLSAKI); needs a teacher in memory."""
    token_weights: TokenWeightOptions = field(default_factory=TokenWeightOptions)
    """Weights of the tokens in the loss, by entropy and by position."""
    lmbda: float = 0.0
    """Probability that an optimizer step is on-policy: the student writes the completions itself (GKD)."""
    beta: float = 0.5
    """Mixing weight of jsd, in (0, 1): near 0 it is like forward KL, near 1 like reverse KL. With distillm2: the
    weight of the rejected completions, in [0, 2]."""
    alpha: float = 0.1
    """Mixing weight alpha of the skewed KL divergences, in [0, 1)."""
    adaptive_alpha: bool = False
    """Let alpha fall, for every completion, where the teacher's and the student's probabilities of it are closer than
    on average over its forward pass (DistiLLM-2); alpha is then its largest value. Needs a teacher in memory."""
    temperature: float = 1.0
    """Temperature that divides both models' logits in the divergence."""
    kd_tail: TailRule = "bucket"
    """Treatment of the tokens outside the top k: bucket joins them into one outcome, renormalize leaves them out and
    renormalises both distributions. With kd_topk_of student also: drop sums p (log p - log q) over the top k, whose
    gradient moves mass out of them; policy_gradient has the same value, and the gradient of log p with p (log p -
    log q) as constant weights."""
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
        self._check_student_topk()
        self._check_adaptive_alpha()
        if self.kd_loss == "sampled_reverse_kl" and (self.kd_topk or self.lmbda < 1.0):
            raise InputError(
                "sampled_reverse_kl is an estimate over the student's own draws: it needs lmbda 1, no kd_topk"
            )
        if self.kd_standardize and (self.kd_loss != "forward_kl" or self.kd_topk or not self.uses_teacher):
            raise InputError("kd_standardize is forward_kl against a teacher in memory, over the whole vocabulary")
        if self.kd_loss in SPAN_LOSSES and (self.kd_topk or self.kd_standardize or not self.uses_teacher):
            raise InputError(f"{self.kd_loss} needs a teacher in memory, no kd_topk and no kd_standardize")
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
        if self.token_weights.entropy_of == "teacher" and not self.uses_teacher:
            raise InputError(
                "token_weights.entropy_of teacher needs the whole distribution of a teacher in memory: give "
                "--teacher-model-name-or-path, or take the entropy of the student"
            )
        from_rows = self.kd_ratio > 0.0 and self.teacher_model_name_or_path is None
        if from_rows and self.temperature != 1.0 and self.kd_tail == "bucket":
            raise InputError(
                "the rows' top k were taken at temperature 1 and say nothing of the tail at another: use "
                "--kd-tail renormalize, temperature 1, or a teacher in memory"
            )

    def _check_adaptive_alpha(self) -> None:
        """Raise InputError where alpha cannot be chosen for every completion."""
        if self.adaptive_alpha and (not self.uses_teacher or self.kd_topk):
            raise InputError(
                "adaptive_alpha compares the models' probabilities: it needs a teacher in memory, no kd_topk"
            )
        if self.adaptive_alpha and self.alpha < SMALLEST_ALPHA:
            raise InputError(f"adaptive_alpha: alpha is the largest value, and must be at least {SMALLEST_ALPHA}")

    def _check_student_topk(self) -> None:
        """Raise InputError where the loss cannot be taken over the student's most likely tokens, or need not be."""
        if self.kd_topk_of == "student" and not self.uses_teacher:
            raise InputError(
                "kd_topk_of student: the rows hold the teacher's probabilities of its own most likely tokens, not of "
                "the student's; give --teacher-model-name-or-path, a model in memory"
            )
        if self.kd_topk_of == "student" and is_url(self.teacher_model_name_or_path):
            raise InputError(
                f"kd_topk_of student: the server {self.teacher_model_name_or_path} gives probabilities of its own most "
                "likely tokens, not of the student's; give the hub id or the directory of a teacher"
            )
        if self.kd_topk_of == "student" and (not self.kd_topk or self.kd_loss != "reverse_kl"):
            raise InputError("kd_topk_of student needs kd_topk and kd_loss reverse_kl")
        if self.kd_tail in PARTIAL_SUMS and self.kd_topk_of != "student":
            raise InputError(
                f"kd_tail {self.kd_tail} sums reverse_kl over the student's own tokens: it needs kd_topk_of student"
            )

    @property
    def is_over_spans(self) -> bool:
        """Whether the divergence is defined for a teacher with another tokenizer, over spans of text."""
        return self.kd_loss in SPAN_LOSSES or self.kd_loss == "sampled_reverse_kl"

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
