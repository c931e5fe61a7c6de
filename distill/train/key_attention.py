"""Learning where the teacher looks: stepwise attention on key information, with a mixture of layers (MoLSAKI,
2604.15701).

    A_l[i, j]   what step i of the completion pays to key word j in layer l (kernels/attention_mass.py)
    teacher     A = sum_l p_l A_l,  p = softmax(G / teacher_temperature),  G_l = mean |A_l[i, j + 1] - A_l[i, j]|
    student     A = sum_l p_l A_l,  p = softmax(r / student_temperature),  r_l = w h_l + b_l, a trained router
    loss        mean over steps of KL(softmax_j A_teacher[i] | softmax_j A_student[i])

h_l is the mean over the tokens of the layer's values, each divided by its root mean square (the paper sums; a sum grows
with the length). Key words are numbers, or given words; every distinct word is one, wherever it stands. Steps are the
completion's. A word that no token of a step can see does not enter the step's softmax, and a step that sees fewer than
two words counts nothing (ours: the paper does not say).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from genssd.engine.errors import InputError
from genssd.engine.steps import step_spans
from genssd.kernels.attention_mass import attention_mass

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
IMPLEMENTATION = "genssd_mass"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyAttentionOptions:
    """Attention on key information as a part of the loss."""

    weight: float = 0.0
    """Of the mean over examples, beside the loss of the tokens; 0: not at all. The paper's is 1."""
    words: tuple[str, ...] = ()
    """The key words; empty: all numbers."""
    max_words: int = 64
    """Of an example, the first ones."""
    rows: Literal["sum", "mean"] = "sum"
    """A step's attention, summed over its tokens as in the paper, or their mean: sums of long steps saturate."""
    teacher_temperature: float = 0.1
    student_temperature: float = 0.5

    def __post_init__(self) -> None:
        if self.weight < 0.0:
            raise InputError(f"key_attention.weight must be at least 0, not {self.weight}")
        if self.max_words < 2:
            raise InputError(f"key_attention.max_words must be at least 2, not {self.max_words}")
        if min(self.teacher_temperature, self.student_temperature) <= 0.0:
            raise InputError("key_attention: temperatures must be positive")


@dataclass(frozen=True, slots=True)
class Keys:
    """Where an example's steps and key words are. step, word: int64 [T], -1 for neither."""

    step: Tensor
    word: Tensor
    steps: int
    words: int

    def visible(self) -> Tensor:
        """bool [S, W]: whether a step's last token comes at or behind a word's first."""
        places = torch.arange(len(self.step), device=self.step.device)
        last = torch.stack([places[self.step == i].max() for i in range(self.steps)])
        first = torch.stack([places[self.word == j].min() for j in range(self.words)])
        return last[:, None] >= first[None]


def find_keys(
    prompt: Sequence[str], completion: Sequence[str], options: KeyAttentionOptions, *, in_prompt: bool = True
) -> Keys | None:
    """From the text of each token; None where there are fewer than two key words or no step.

    in_prompt: whether words of the prompt count, too. The first token of all is never part of a word: much attention
    goes there whatever it is.
    """
    pieces = [*prompt, *completion]
    listed = "|".join(map(re.escape, options.words))
    pattern = re.compile(rf"(?<!\w)(?:{listed})(?!\w)") if listed else NUMBER
    word = torch.full((len(pieces),), -1)
    found: dict[str, int] = {}
    # each on its own: a number that ends the prompt does not go on in the completion
    for first, part in ((0, prompt if in_prompt else ()), (len(prompt), completion)):
        offsets = [0, *accumulate(map(len, part))]
        token = 0
        for match in pattern.finditer("".join(part)):
            while offsets[token + 1] <= match.start():
                token += 1
            places = [t for t in range(token, len(part)) if offsets[t] < match.end() and offsets[t + 1] > match.start()]
            places = [first + t for t in places if first + t > 0 and word[first + t] < 0]
            if places and (match.group() in found or len(found) < options.max_words):
                word[places] = found.setdefault(match.group(), len(found))
    step = torch.full((len(pieces),), -1)
    content = len(completion)
    while content and not completion[content - 1]:
        content -= 1  # the end of sequence has no text and is part of no step
    spans = step_spans(completion[:content])
    for i, (start, end) in enumerate(spans):
        step[len(prompt) + start : len(prompt) + end] = i
    if len(found) < 2 or not spans:
        return None
    return Keys(step, word, len(spans), len(found))


class LayerAttention:
    """What a forward pass leaves behind: per example with keys, the masses of every layer [L, S, W] and its values'
    summary [L, d]."""

    def __init__(self, keys: Sequence[Keys | None]) -> None:
        self.keys = keys
        self.masses: list[list[Tensor]] = [[] for _ in keys]
        self.values: list[list[Tensor]] = [[] for _ in keys]

    def take(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """One layer's, [B, heads, T, E] each."""
        for row, found in enumerate(self.keys):
            if found is not None:
                tokens = len(found.step)
                self.masses[row].append(
                    attention_mass(
                        query[row, :, :tokens].transpose(0, 1),
                        key[row, :, :tokens].transpose(0, 1),
                        found.step,
                        found.word,
                        steps=found.steps,
                        words=found.words,
                        scale=scale,
                    )
                )
                flat = value[row, :, :tokens].transpose(0, 1).flatten(1).float()
                self.values[row].append((flat * (flat.square().mean(1, keepdim=True) + 1e-6).rsqrt()).mean(0))


_collecting: ContextVar[LayerAttention | None] = ContextVar("collecting", default=None)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    """transformers' sdpa, with an eye on what it attends to."""
    layers = _collecting.get()
    if layers is not None:
        scale = options.get("scaling")
        layers.take(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@contextmanager
def collecting(keys: Sequence[Keys | None]) -> Iterator[LayerAttention]:
    """While a model whose attention is IMPLEMENTATION runs over padded rows, one per element of keys."""
    layers = LayerAttention(keys)
    token = _collecting.set(layers)
    try:
        yield layers
    finally:
        _collecting.reset(token)


def teacher_shares(masses_LSW: Tensor, temperature: float) -> Tensor:
    """The weight of every layer, [L]: larger where attention changes more from word to word."""
    change = (masses_LSW[:, :, 1:] - masses_LSW[:, :, :-1]).abs().mean((1, 2))
    return (change / temperature).softmax(0)


class Router(torch.nn.Module):
    """The student's weight of every layer, from the layer's values alone."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))
        self.bias = torch.nn.Parameter(torch.zeros(layers))

    def forward(self, values_Ld: Tensor, temperature: float) -> Tensor:
        """[L]; all the same before the first step."""
        return ((values_Ld @ self.weight + self.bias) / temperature).softmax(0)


def key_attention_loss(
    teacher: LayerAttention, student: LayerAttention, router: Router, options: KeyAttentionOptions
) -> Tensor:
    """The sum over the examples of their mean over steps; 0 for an example without keys."""
    total = router.weight.sum() * 0.0
    for row, keys in enumerate(student.keys):
        if keys is None:
            continue
        theirs, ours = torch.stack(teacher.masses[row]).detach(), torch.stack(student.masses[row])
        if options.rows == "mean":
            lengths = torch.bincount(keys.step[keys.step >= 0], minlength=keys.steps).to(ours)[None, :, None]
            theirs, ours = theirs / lengths, ours / lengths
        shares = router(torch.stack(student.values[row]), options.student_temperature)
        expected = torch.einsum("l,lsw->sw", teacher_shares(theirs, options.teacher_temperature), theirs)
        found = torch.einsum("l,lsw->sw", shares.to(ours), ours)
        total = total + _divergence(expected, found, keys.visible())
    return total


def _divergence(expected_SW: Tensor, found_SW: Tensor, visible_SW: Tensor) -> Tensor:
    """The mean over the steps that see two words or more."""
    counts = visible_SW.sum(1) > 1
    if not bool(counts.any()):
        return found_SW.sum() * 0.0
    least = torch.finfo(found_SW.dtype).min
    log_q, log_p = (x[counts].masked_fill(~visible_SW[counts], least).log_softmax(1) for x in (expected_SW, found_SW))
    return (log_q.exp() * (log_q - log_p)).masked_fill(~visible_SW[counts], 0.0).sum(1).mean()
