"""What the models of `genssd leaf` do: the gradients at the tokens of a question, and the spans that follow from them.

The models are transformers' own, because the engine computes no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from genssd.distill.data.traces import Trace
from genssd.distill.pool.worker import Recipe
from genssd.distill.score.words import group_words
from genssd.distill.train.models import load_teacher
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.common.errors import NumericsError
from genssd.engine.common.usage import CacheUse, Usage
from genssd.engine.decoding.feed import Feed
from genssd.engine.engine import Engine
from genssd.engine.models.launches import LaunchRecord
from genssd.engine.models.transformers_loading import load_model, logits_softcap, scale_states
from genssd.engine.search.budget import Budget
from genssd.engine.served.record import ServerRecord
from genssd.engine.setup.memory import choose_device, choose_dtype
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Tokenizer
from genssd.kernels.cross_entropy import linear_cross_entropy
from genssd.kernels.threads import torch_threads

NO_CACHE = CacheUse(held_pages=0, pages=0, held_bytes=0, bytes=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientModels:
    """Student and teacher as transformers' models, as a worker has them: they sample nothing and have no caches."""

    student: Any
    teacher: Any
    tokenizer: Tokenizer
    """The student's tokenizer."""
    threads: int
    """Number of CPU threads, on which gradients depend by their rounding."""
    usage: Usage = field(default_factory=Usage)
    cache_use: CacheUse = NO_CACHE
    launches: LaunchRecord | None = None
    server: ServerRecord | None = None
    teachers: Sequence[Engine] = ()

    @staticmethod
    def load(student: str, teacher: str, chat: ChatOptions, *, device: str | None, threads: int) -> GradientModels:
        """Load the models (hub ids or local directories), in the types of their checkpoints.

        Raises InputError where the teacher does not have the student's tokens, and CheckpointError.
        """
        target, sources = choose_device(device), (locate(student), locate(teacher))
        tokenizer = Tokenizer(sources[0]).with_chat(chat)
        own = load_model(sources[0], tokenizer, target, dtype=choose_dtype(sources[0], "auto", target)).eval()
        other = load_teacher(sources[1], tokenizer, target, choose_dtype(sources[1], "auto", target))
        return GradientModels(student=own, teacher=other.model, tokenizer=tokenizer, threads=threads)


@dataclass(frozen=True, kw_only=True)
class GradientRecipe(Recipe[GradientModels]):
    """How a worker opens the models."""

    student: str
    teacher: str
    chat: ChatOptions
    device: str
    threads: int

    def load(self) -> GradientModels:
        """Load the models. Raises the errors of `GradientModels.load`."""
        return GradientModels.load(self.student, self.teacher, self.chat, device=self.device, threads=self.threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafWork:
    """The spans that distract the student; a `Work`, whose items are places of traces."""

    traces: Mapping[int, Trace]
    """Traces by their places, in the order in which they are done."""
    share: float
    """Fraction of a question's tokens that is chosen."""

    most_tokens: ClassVar[int] = 0

    @property
    def items(self) -> Sequence[int]:
        """The places of all traces."""
        return list(self.traces)

    def run(self, models: GradientModels, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, list[list[int]]]]:
        """Yield the spans of every trace, as lists of indices of prompt tokens; see `Work`."""
        items = iter(self.traces) if feed is None else iter(lambda: feed.take(wait=True), None)
        for item in items:
            yield item, find_spans(models, self.traces[item], self.share)


def find_spans(models: GradientModels, trace: Trace, share: float) -> list[list[int]]:
    """Return the spans of a question that distract the student, as lists of indices of prompt tokens."""
    places = question_places(trace, models.tokenizer)
    with torch_threads(models.threads):
        student, teacher = (gradient_norms(model, trace)[places] for model in (models.student, models.teacher))
    words = words_of_places(trace, places, models.tokenizer)
    return [[places[i] for i in span] for span in distracting_spans(student, teacher, words, share)]


def question_places(trace: Trace, tokenizer: Tokenizer) -> list[int]:
    """Return the indices of the question's tokens in the prompt, without special tokens.

    Where the text of the question does not occur in the prompt, these are all tokens of the prompt.
    """
    pieces = tokenizer.pieces(trace.prompt_ids)
    offsets = [0, *accumulate(map(len, pieces))]
    start = "".join(pieces).rfind(trace.question)
    special = set(tokenizer.hf.all_special_ids)
    places = [i for i, token in enumerate(trace.prompt_ids) if token not in special]
    if start < 0:
        return places
    end = start + len(trace.question)
    return [
        i
        for i in places
        if offsets[i] < end
        and offsets[i + 1] > start
        # a token that joins the question and the template's text is part of the template
        and not (pieces[i][: max(start - offsets[i], 0)] + pieces[i][end - offsets[i] :]).strip()
    ]


def words_of_places(trace: Trace, places: Sequence[int], tokenizer: Tokenizer) -> list[int | None]:
    """Return the number of the word that each of some prompt tokens belongs to; None for white space."""
    inside = set(places)
    pieces = tokenizer.pieces(trace.prompt_ids)
    words = group_words([piece if i in inside else " " for i, piece in enumerate(pieces)])
    return [words[i] for i in places]


def gradient_norms(model: Any, trace: Trace) -> Tensor:
    """Return |d loss / d embedding| of every prompt token, float32 [prompt tokens]; loss is the completion's
    cross-entropy.

    Raises NumericsError naming the trace when a gradient is not finite.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*trace.prompt_ids, *trace.response_ids]], device=device)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
    first = len(trace.prompt_ids)
    head = model.get_output_embeddings().weight.detach()
    loss = linear_cross_entropy(
        scale_states(model, hidden[first - 1 : -1]), head, ids[0, first:], softcap=logits_softcap(model)
    ).total
    (gradient,) = torch.autograd.grad(loss, [embedded])
    norms: Tensor = gradient[0, :first].float().norm(dim=1).cpu()
    if not bool(torch.isfinite(norms).all()):
        raise NumericsError(f"{trace.where}: the gradient of {model.config.model_type} is not finite")
    return norms


def distracting_spans(
    student_norms: Tensor, teacher_norms: Tensor, words: Sequence[int | None], fraction: float
) -> list[list[int]]:
    """Return the spans of tokens that influence the student and not the teacher, as lists of indices.

    student_norms, teacher_norms: gradient norms, float32 [tokens]. words: the number of each token's word; white space
    (None) is never chosen. fraction: how many of the tokens are chosen, rounded up; words are taken as a whole, in the
    order of their token with the least difference, until there are so many.
    """
    delta = scaled(scaled(teacher_norms) - scaled(student_norms)).tolist()
    visible = [i for i, word in enumerate(words) if word is not None]
    count = math.ceil(fraction * len(words) - 1e-9)
    chosen_words = set[int | None]()
    chosen: list[int] = []
    for i in sorted(visible, key=lambda i: delta[i]):
        if len(chosen) >= count:
            break
        if words[i] not in chosen_words:
            chosen_words.add(words[i])
            chosen += [j for j in visible if words[j] == words[i]]
    spans: list[list[int]] = []
    for i in sorted(chosen):
        if spans and i == spans[-1][-1] + 1:
            spans[-1].append(i)
        else:
            spans.append([i])
    # without the whole question there would be nothing to answer
    return [span for span in spans if len(span) < len(visible)]


def scaled(values: Tensor) -> Tensor:
    """Return the values scaled linearly to [0, 1]; all 0 where they are all equal."""
    if not len(values):
        return values
    spread = values.max() - values.min()
    return (values - values.min()) / spread if float(spread) > 0.0 else torch.zeros_like(values)
