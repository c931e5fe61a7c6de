"""Texts of tokens, and tokenizers that may be gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.common.errors import GenssdError
from genssd.engine.texts.text import Tokenizer

CONTEXT = 8
"""Number of tokens before a chunk with which it is decoded: its first token may complete a character of theirs."""


class TokenTexts:
    """The texts of the tokens of one run.

    fault: why there is no tokenizer, in a sentence, so that the texts are token ids; None where there is one.
    """

    def __init__(self, tokenizer: Tokenizer | None, fault: str | None) -> None:
        self.tokenizer = tokenizer
        self.fault = fault

    @classmethod
    def open(cls, directory: str | None, fingerprint: str | None) -> TokenTexts:
        """Load the tokenizer of a directory. fingerprint: that of the tokenizer whose ids the run's rows have."""
        if directory is None:
            return cls(None, "The run names no student, so that tokens are shown as their ids.")
        try:
            tokenizer = Tokenizer(locate(directory))
        except GenssdError as error:
            return cls(None, f"Tokens are shown as their ids, because the tokenizer cannot be loaded: {error}.")
        if fingerprint is not None and tokenizer.fingerprint != fingerprint:
            return cls(
                None,
                f"Tokens are shown as their ids: {directory} has another tokenizer now than when the run was written.",
            )
        return cls(tokenizer, None)

    def decode(self, token_ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """Return the text that each token completes. before: tokens in front of them."""
        if self.tokenizer is None:
            return [f"⟨{token}⟩" for token in token_ids]
        context = list(before[-CONTEXT:])
        return self.tokenizer.pieces([*context, *token_ids])[len(context) :]


def write_prompt(prompt: object) -> str:
    """Return a prompt of a row, text or messages, as text."""
    if isinstance(prompt, str):
        return prompt
    messages = prompt if isinstance(prompt, list) else []
    texts = [_write_message(message) for message in messages if isinstance(message, Mapping)]
    return "\n\n".join(texts[0][1:] if len(texts) == 1 else (f"{role}: {text}" for role, text in texts))


def _write_message(message: Mapping[str, Any]) -> tuple[str, str]:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return str(message.get("role", "")), "" if content is None else str(content)
