"""Turns of two writers: what a method asks the engine for next, and the response that comes out.

A method of two writers is a generator for one response: it yields a `Turn`, is sent the candidates that were sampled
for it, and returns the response. Many of them run side by side (two_writers.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genssd.engine.calls.generation import Completion
from genssd.engine.common.model_choices import Role
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.texts.text import Tokenizer

WRITERS: tuple[Role, Role] = ("teacher", "student")


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenChunk:
    """Consecutive tokens of a response that one model wrote."""

    tokens: int
    """Number of tokens in the chunk."""
    characters: int
    """Number of characters of text in the chunk, without special tokens."""
    writer: Role
    """Model that wrote the chunk."""
    score: float | None = None
    """Value of the criterion by which the chunk was chosen; None where no criterion chose."""
    runner_up: float | None = None
    """Best value among the other model's candidates for its place; None where no criterion chose."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TwoWriterCompletion(Completion):
    """A response that teacher and student wrote in turns.

    `logprob` is the teacher's for all tokens, whoever wrote them; `substituted` counts the student's tokens.
    """

    chunks: tuple[WrittenChunk, ...] = ()
    """Chunks of the response in order, and who wrote each."""
    sampled_tokens: int = 0
    """Number of tokens that both models sampled for the response, those that were not kept included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a method asks for: n candidates of one branch by one model."""

    branch: Branch
    writer: Role
    n: int
    chunk: Chunk
    sampling: Sampling | None = None
    """How the student samples; None for the teacher, which samples as the branch was made."""


Writing = Generator[Turn, list[Branch], TwoWriterCompletion]
"""A response while it is written."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one writer while their text is not known yet, with the values of `WrittenChunk`."""

    tokens: int
    writer: Role
    score: float | None = None
    runner_up: float | None = None


def make_completion(
    branch: Branch, spans: Sequence[Span], sampled_tokens: int, tokenizer: Tokenizer
) -> TwoWriterCompletion:
    """Return the response of an ended branch. spans: of all its tokens, in order."""
    specials = frozenset(tokenizer.hf.all_special_ids)
    lengths = [
        0 if token in specials else len(piece)
        for token, piece in zip(branch.history, tokenizer.pieces(branch.history), strict=True)
    ]
    chunks, start = [], 0
    for span in spans:
        if not span.tokens:  # of a last chunk a stop string has left nothing
            continue
        end = start + span.tokens
        chunks.append(
            WrittenChunk(
                tokens=span.tokens, characters=sum(lengths[start:end]), writer=span.writer, score=span.score,
                runner_up=span.runner_up,
            )
        )  # fmt: skip
        start = end
    assert start == len(branch.history), "a token has no writer"
    return TwoWriterCompletion(
        token_ids=tuple(branch.history),
        text=branch.text,
        status="finished" if branch.ended in ("finished", "stopped") else "length",
        stop_reason=branch.stop_reason,
        logprob=tuple(value for part in branch.history_writer_logprob for value in part.tolist()),
        substituted=sum(span.tokens for span in spans if span.writer == "student"),
        chunks=tuple(chunks),
        sampled_tokens=sampled_tokens,
    )


def describe_writers(chunks: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the tokens and characters of each writer in the chunks of rows, and their fractions of all."""
    tokens: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for chunk in chunks:
        tokens[chunk["writer"]] += chunk["tokens"]
        characters[chunk["writer"]] += chunk["characters"]
    return {
        writer: {
            "tokens": tokens[writer],
            "characters": characters[writer],
            "token_share": tokens[writer] / max(1, tokens.total()),
            "text_share": characters[writer] / max(1, characters.total()),
        }
        for writer in WRITERS
    }
