"""Small tokenizers of different kinds, trained on a few lines of many scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.tokenizer_families import SPLIT
from support.toys import save_model
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "The student reads what the teacher writes. It's 12 apples and 345 pears; they'll cost $67.89, don't they?",
    "So 3 * (4 + 5) = 27, and the answer is \\boxed{27}.\n\nStep 1: let $x^2 + \\frac{a}{b} = \\sqrt{c}$.",
    "def f(x):\n\tif x > 10:\n\t\treturn x ** 2  # ok\n    return  [x,  x]\n\n\n",
    "数学の問題です。答えは四十二です\uff01 我们先计算总数\uff0c然后除以三。",
    "مرحبا بالعالم، كيف حالك اليوم؟ الجواب هو ٤٢.",
    "Voilà un café crème à l'été; Ωμέγα и Москва 🙂 👩‍👩‍👧 🇫🇷",
)  # fmt: skip
"""What the tokenizers are trained on, and what the tests write."""
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pattern of GPT-4o's tokenizer, whose contractions belong to the word before them."""
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("llama2", "mistral", "unigram", "qwen", "o200k", "deepseek", "smollm", "gemma")
"""Kinds of tokenizers that read by bytes."""
SPECIAL = ("<end>", "<turn>")
"""Special tokens of every tokenizer; the first one ends a sequence."""


def build(kind: str, added: Sequence[str] = (), *, special: Sequence[str] = SPECIAL, size: int = 420) -> RawTokenizer:
    """Return a tokenizer of a kind. added: added tokens that are text."""
    backend = (
        _build_pieces(kind, size) if kind in ("gemma", "llama2", "mistral", "unigram") else _build_bytes(kind, size)
    )
    backend.add_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    return backend


def save(directory: Path, backend: RawTokenizer, *, template: str | None = None, **options: Any) -> Path:
    """Write a random checkpoint with a tokenizer, and return its directory. options: of `save_model`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    save_model(
        directory,
        **{"vocab_size": backend.get_vocab_size() + 3, "eos_token_id": backend.token_to_id(SPECIAL[0]), **options},
    )
    return directory


def _build_bytes(kind: str, size: int) -> RawTokenizer:
    """Return a byte-level tokenizer."""
    splits: list[Any] = {
        "qwen": [pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")],
        "o200k": [pre_tokenizers.Split(Regex(O200K), behavior="isolated")],
        "deepseek": [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[一-龥\u3040-\u309f\u30a0-ヿ]+"), behavior="isolated"),
            pre_tokenizers.Split(Regex(DEEPSEEK), behavior="isolated"),
        ],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    }[kind]
    backend = RawTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm")]
    )
    if kind == "qwen":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def _build_pieces(kind: str, size: int) -> RawTokenizer:
    """Return a tokenizer in the style of SentencePiece."""
    trained = RawTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581\u2581", "\u2581\u2581\u2581\u2581"]
    names += [name for name in model["vocab"] if name not in names]
    merges = [("\u2581", "\u2581"), ("\u2581\u2581", "\u2581\u2581"), *(tuple(pair) for pair in model["merges"])]
    if kind == "unigram":
        pieces = [(name, -10.0 - i / 100 if i > 256 else -50.0) for i, name in enumerate(names)]
        backend = RawTokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    else:
        vocab = {name: i for i, name in enumerate(names)}
        backend = RawTokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    steps: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "llama2":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        steps.append(decoders.Strip(" ", 1, 0))
    elif kind == "mistral":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Replace(" ", "\u2581")
    if kind == "gemma":  # never divides, as its spaces were replaced before
        backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(steps)
    return backend
