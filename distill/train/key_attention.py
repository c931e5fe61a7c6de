"""Attention on key words as a part of the loss: stepwise attention on key information, with a mixture of layers
(MoLSAKI, 2604.15701).

    A_l[i, j]   attention of step i of the completion to key word j in layer l (kernels/attention_mass.py)
    teacher     A = sum_l p_l A_l,  p = softmax(G / teacher_temperature),  G_l = mean |A_l[i, j + 1] - A_l[i, j]|
    student     A = sum_l p_l A_l,  p = softmax(r / student_temperature),  r_l = w h_l + b_l, a trained router
    loss        mean over steps of KL(softmax_j A_teacher[i] | softmax_j A_student[i])

h_l is the mean over the tokens of the layer's values, each divided by its root mean square (the paper sums; a sum grows
with the length). Key words are numbers, or the words in `words`; every distinct word counts as one key word, wherever
it occurs. Steps are those of the completion. A word that no token of a step can attend to is left out of the step's
softmax, and a step that can attend to fewer than two words is left out of the mean (our choice: the paper does not
specify it).

Shapes:  T tokens   S steps   W key words   L layers   d key-value heads * their width
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from genssd.distill.train.key_attention_options import KeyAttentionOptions
from genssd.engine.texts.steps import step_spans
from genssd.kernels.attention_mass import attention_mass

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
IMPLEMENTATION = "genssd_mass"
"""Name of the attention implementation, in transformers, that fills an AttentionCollector."""


@dataclass(frozen=True, slots=True)
class KeyWords:
    """The step and the key word that each token of an example belongs to."""

    step_T: Tensor
    """Index of the token's step, int64 [T]; -1: the token belongs to no step."""
    word_T: Tensor
    """Index of the token's key word, int64 [T]; -1: the token belongs to no key word."""
    num_steps: int
    num_words: int

    def find_visible(self) -> Tensor:
        """Return bool [S, W]: whether the last token of a step can attend to the first token of a word."""
        places = torch.arange(len(self.step_T), device=self.step_T.device)
        last = torch.stack([places[self.step_T == i].max() for i in range(self.num_steps)])
        first = torch.stack([places[self.word_T == j].min() for j in range(self.num_words)])
        return last[:, None] >= first[None]


def find_key_words(
    prompt: Sequence[str], completion: Sequence[str], options: KeyAttentionOptions, *, in_prompt: bool = True
) -> KeyWords | None:
    """Find key words and steps in the text of each token; return None if there are fewer than two words or no step.

    in_prompt: whether words of the prompt are key words, too. The first token of the sequence never belongs to a word:
    it gets much attention whatever it is.
    """
    pieces = [*prompt, *completion]
    alternatives = "|".join(map(re.escape, options.words))
    pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)") if alternatives else NUMBER
    word_T = torch.full((len(pieces),), -1)
    word_index: dict[str, int] = {}
    # prompt and completion are searched separately: a number at the end of the prompt does not continue after it
    for first, part in ((0, prompt if in_prompt else ()), (len(prompt), completion)):
        offsets = [0, *accumulate(map(len, part))]
        token = 0
        for match in pattern.finditer("".join(part)):
            while offsets[token + 1] <= match.start():
                token += 1
            places = [t for t in range(token, len(part)) if offsets[t] < match.end() and offsets[t + 1] > match.start()]
            places = [first + t for t in places if first + t > 0 and word_T[first + t] < 0]
            if places and (match.group() in word_index or len(word_index) < options.max_words):
                word_T[places] = word_index.setdefault(match.group(), len(word_index))
    step_T = torch.full((len(pieces),), -1)
    content = len(completion)
    while content and not completion[content - 1]:
        content -= 1  # the end-of-sequence token has no text and belongs to no step
    spans = step_spans(completion[:content])
    for i, (start, end) in enumerate(spans):
        step_T[len(prompt) + start : len(prompt) + end] = i
    if len(word_index) < 2 or not spans:
        return None
    return KeyWords(step_T, word_T, len(spans), len(word_index))


class AttentionCollector:
    """Attention to key words of one forward pass over padded rows, collected layer by layer.

    Pass it to a model whose attention implementation is IMPLEMENTATION as the keyword argument `attention_collector`.
    masses and values have one list per row, which stays empty for a row without key words; its elements are the layers'
    attention to the key words, [S, W], and the mean of their normalized values, [d].
    """

    def __init__(self, key_words: Sequence[KeyWords | None]) -> None:
        """key_words: of each row of the batch."""
        self.key_words = key_words
        self.masses: list[list[Tensor]] = [[] for _ in key_words]
        self.values: list[list[Tensor]] = [[] for _ in key_words]

    @property
    def is_filled(self) -> bool:
        """Whether every row with key words has got a layer."""
        return all(masses for masses, words in zip(self.masses, self.key_words, strict=True) if words is not None)

    def add_layer(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Add a layer, of which query, key and value are [B, heads, T, head width]."""
        for row, words in enumerate(self.key_words):
            if words is not None:
                tokens = len(words.step_T)
                self.masses[row].append(
                    attention_mass(
                        query[row, :, :tokens].transpose(0, 1),
                        key[row, :, :tokens].transpose(0, 1),
                        words.step_T,
                        words.word_T,
                        steps=words.num_steps,
                        words=words.num_words,
                        scale=scale,
                    )
                )
                flat = value[row, :, :tokens].transpose(0, 1).flatten(1).float()
                self.values[row].append((flat * (flat.square().mean(1, keepdim=True) + 1e-6).rsqrt()).mean(0))


def _collect_and_attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    attention_collector: AttentionCollector | None = None,
    **options: Any,
) -> Any:
    """Compute transformers' sdpa attention and add the layer to the collector, if the model was called with one."""
    if attention_collector is not None:
        scale = options.get("scaling")
        attention_collector.add_layer(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(IMPLEMENTATION, _collect_and_attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def weigh_teacher_layers(masses_LSW: Tensor, temperature: float) -> Tensor:
    """Return the weight of every layer, [L]; it is larger where attention changes more from word to word."""
    change = (masses_LSW[:, :, 1:] - masses_LSW[:, :, :-1]).abs().mean((1, 2))
    return (change / temperature).softmax(0)


class LayerRouter(torch.nn.Module):
    """Trained function from the values of the student's layers to the weight of each layer."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))
        self.bias = torch.nn.Parameter(torch.zeros(layers))

    def forward(self, values_Ld: Tensor, temperature: float) -> Tensor:
        """Return the weight of every layer, [L]; before the first optimizer step all layers have the same weight."""
        return ((values_Ld @ self.weight + self.bias) / temperature).softmax(0)


def compute_key_attention_loss(
    teacher: AttentionCollector, student: AttentionCollector, router: LayerRouter, options: KeyAttentionOptions
) -> Tensor:
    """Return the sum over the examples of their mean over steps; an example without key words adds 0."""
    total = router.weight.sum() * 0.0
    for row, words in enumerate(student.key_words):
        if words is None:
            continue
        teacher_LSW, student_LSW = torch.stack(teacher.masses[row]).detach(), torch.stack(student.masses[row])
        if options.rows == "mean":
            step_T = words.step_T
            lengths = torch.bincount(step_T[step_T >= 0], minlength=words.num_steps).to(student_LSW)[None, :, None]
            teacher_LSW, student_LSW = teacher_LSW / lengths, student_LSW / lengths
        teacher_L = weigh_teacher_layers(teacher_LSW, options.teacher_temperature)
        student_L = router(torch.stack(student.values[row]), options.student_temperature).to(student_LSW)
        teacher_SW = torch.einsum("l,lsw->sw", teacher_L, teacher_LSW)
        student_SW = torch.einsum("l,lsw->sw", student_L, student_LSW)
        total = total + _compute_kl(teacher_SW, student_SW, words.find_visible())
    return total


def _compute_kl(teacher_SW: Tensor, student_SW: Tensor, visible_SW: Tensor) -> Tensor:
    """Return the mean KL(teacher | student) over the steps to which two words or more are visible.

    visible_SW: see `KeyWords.find_visible`; it may lie on the CPU.
    """
    counted = visible_SW.sum(1) > 1
    if not bool(counted.any()):
        return student_SW.sum() * 0.0
    visible_SW = visible_SW[counted].to(student_SW.device)
    least = torch.finfo(student_SW.dtype).min
    log_q, log_p = (x[counted].masked_fill(~visible_SW, least).log_softmax(1) for x in (teacher_SW, student_SW))
    return (log_q.exp() * (log_q - log_p)).masked_fill(~visible_SW, 0.0).sum(1).mean()
