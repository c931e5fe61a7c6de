"""Stop strings by their definition on whole texts, and models that write words in which they stand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from support.byte_tokenizers import SPECIAL, build
from support.toys import save_markov
from transformers import PreTrainedTokenizerFast

from genssd.engine.texts.text import Tokenizer
from genssd.engine.texts.text_stream import REPLACEMENT


def find_by_hand(tokenizer: Tokenizer, ids: Sequence[int], stops: Sequence[str]) -> tuple[int, int] | None:
    """The number of tokens with which the text first holds a stop string, and the place of the first one in it."""
    for count in range(1, len(ids) + 1):
        text = str(tokenizer.hf.decode(list(ids[:count])))
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        if places:
            return count, min(places)
    return None


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.hf.decode(list(ids)))


def substrings(text: str, lengths: Sequence[int]) -> list[str]:
    """Parts of a text that hold no broken character, from its middle on."""
    parts = [text[i : i + n] for n in lengths for i in range(len(text) // 3, len(text) - n, 7)]
    return [part for part in parts if REPLACEMENT not in part and part.isascii() and "<" not in part]


def save_words(directory: Path, kind: str, seed: int, *, logits_seed: int | None = None) -> Path:
    """Write a model that writes seven words of several letters each, and seldom the end, in the tokenizer of a kind.

    seed: of the words, and of their probabilities unless logits_seed is given.
    """
    backend = build(kind, size=700)
    words = sorted(
        (i for word, i in backend.get_vocab().items() if len(word) > 2 and word.isascii() and word.isprintable()),
        key=lambda i: (i * 7919 + seed) % 997,
    )
    tokens = [*[i for i in words if "<" not in backend.id_to_token(i)][:7], backend.token_to_id(SPECIAL[0])]
    logits = torch.randn(8, 8, generator=torch.Generator().manual_seed(seed if logits_seed is None else logits_seed))
    logits[:, 7] = -4.0
    save_markov(directory, tokens, logits, vocab_size=backend.get_vocab_size() + 3, eos_token_id=tokens[7])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0]).save_pretrained(directory)
    return directory
