"""Small tokenizers that relate to each other as the published ones do: the same text tokens, other added tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.toys import save_model
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("in", "k"), ("<", "/"), ("e", "r")]
"""Merges that all families share."""
NUM_REGULAR = 256 + len(MERGES)
QWEN25 = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip
"""Added tokens in the order of their ids; in the model they begin at 151643."""
QWEN3 = [*QWEN25, "<tool_response>", "</tool_response>", "<think>", "</think>"]
R1_END, R1_BEGIN = "<\uff5cend\u2581of\u2581sentence\uff5c>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
R1_USER, R1_ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
R1_QWEN = [R1_END, R1_USER, R1_ASSISTANT, R1_BEGIN, "<|EOT|>", "<think>", "</think>", *QWEN25[7:]]
NOT_SPECIAL = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Added tokens that decoding keeps."""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EMBEDDING_ROWS = NUM_REGULAR + 25
"""Rows of every embedding: more than any family has tokens, as in the published checkpoints."""


def build_backend(added: Sequence[str], merges: Sequence[tuple[str, str]] = MERGES) -> RawTokenizer:
    """Return a byte-level tokenizer."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted("".join(pair) for pair in merges)
    backend = RawTokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=list(merges)))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, special=name not in NOT_SPECIAL, normalized=False) for name in added])
    return backend


def save_backend(directory: Path, backend: RawTokenizer, end: str, template: str | None = None) -> None:
    """Write a tokenizer whose end of sequence is `end`."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def save_family(directory: Path, added: Sequence[str], end: str, *, seed: int = 0) -> Path:
    """Write a random checkpoint with the tokenizer of a family; return its directory."""
    directory.mkdir(parents=True)
    backend = build_backend(added)
    save_backend(directory, backend, end)
    end_id = backend.token_to_id(end)
    save_model(directory, "qwen2", seed=seed, vocab_size=EMBEDDING_ROWS, eos_token_id=end_id)
    return directory


def save_qwen25(directory: Path, *, seed: int = 0) -> Path:
    return save_family(directory, QWEN25, "<|im_end|>", seed=seed)


def save_qwen3(directory: Path, *, seed: int = 0) -> Path:
    return save_family(directory, QWEN3, "<|im_end|>", seed=seed)


def save_r1_qwen(directory: Path, *, seed: int = 0) -> Path:
    return save_family(directory, R1_QWEN, R1_END, seed=seed)


def edit_tokenizer(directory: Path, edit: Any) -> None:
    """Change the fields of tokenizer.json by a function that takes them."""
    path = directory / "tokenizer.json"
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))
