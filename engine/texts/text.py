"""Text and token ids: a checkpoint's tokenizer and its chat template."""

from __future__ import annotations

import copy
import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from genssd.engine.checkpoints.basic_config import is_known_to_transformers, make_transformers_config
from genssd.engine.checkpoints.config import load_config
from genssd.engine.checkpoints.config_files import read_fields, refuse_pointer
from genssd.engine.common.errors import CheckpointError, InputError
from genssd.engine.common.quoting import one_line
from genssd.engine.texts.chat import NO_SYSTEM_PROMPT, ChatTemplate, Messages
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.control_tokens import iter_texts
from genssd.engine.texts.text_stream import open_stream

Prompt = str | Messages | Sequence[int]
"""A prompt: raw text | chat messages (rendered with the chat template, generation prompt added) | token ids."""


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
"""Names of the files that a tokenizer is loaded from, each of which may be a Git LFS pointer."""
PROBE = "one two three"
"""Text that a tokenizer encodes and decodes when it is loaded, to show that its class keeps spaces."""
PROMPT_KINDS = "a prompt is a string, a list of chat messages or a list of token ids"


class Tokenizer:
    """A checkpoint's tokenizer. `hf` is the transformers object, `fingerprint` identifies the vocabulary."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hf = _load_tokenizer(directory)
        self._token_text: dict[int, str] = {}
        vocabulary = json.dumps(sorted(self.hf.get_vocab().items()))
        self.fingerprint = hashlib.sha256(vocabulary.encode()).hexdigest()[:16]

    @cached_property
    def chat(self) -> ChatTemplate:
        """The checkpoint's chat template."""
        return ChatTemplate(self.hf, self.directory)

    def with_chat(self, options: ChatOptions) -> Tokenizer:
        """Return this tokenizer with other options of rendering chats.

        Raises InputError naming a variable of the options that the chat template does not read.
        """
        other = copy.copy(self)
        other.__dict__.pop("end_names", None)  # it depends on the chat template
        other.chat = ChatTemplate(self.hf, self.directory, options)
        other.chat.check_options()
        return other

    def with_ends(self, ids: Iterable[int]) -> Tokenizer:
        """Return this tokenizer with further tokens that end a response."""
        other = copy.copy(self)
        other.__dict__.pop("end_names", None)
        other.end_token_ids = self.end_token_ids | frozenset(ids)
        return other

    @cached_property
    def largest_id(self) -> int:
        """Largest token id of the vocabulary."""
        return int(max(self.hf.get_vocab().values()))

    @property
    def eos_token_id(self) -> int | None:
        """Token id of the end of sequence; None where the tokenizer has none."""
        eos = self.hf.eos_token_id
        return None if eos is None else int(eos)

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end a response: the tokenizer's end of sequence, and those that the checkpoint's configs list."""
        listed = load_config(self.directory).eos_token_ids
        return frozenset(listed) | (frozenset() if self.eos_token_id is None else {self.eos_token_id})

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt. Raises InputError when it is empty or cannot be rendered."""
        messages = as_messages(prompt)
        if messages is not None:
            ids = self.encode_rendered(self.render_prompt(messages))
        elif isinstance(prompt, str):
            self.check_raw()
            ids = self.encode_raw(prompt) if prompt.strip() else []
        else:
            ids = self._check_ids(_parts(prompt))
        if not ids:
            raise InputError("the prompt is empty")
        return ids

    def render_prompt(self, messages: Messages) -> str:
        """Return messages as the chat template renders them, the assistant's turn opened; see `encode_rendered`.

        Raises InputError on half of a surrogate pair, and where they cannot be rendered.
        """
        for text in iter_texts(messages):
            require_characters(text)
        return self.chat.render(messages)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of a text. special: add the tokens that the tokenizer puts around a sequence (BOS).

        Raises InputError on half of a surrogate pair, which is no character.
        """
        require_characters(text)
        return [int(i) for i in self.hf.encode(text, add_special_tokens=special)]

    def encode_rendered(self, text: str) -> list[int]:
        """Return the token ids of a text that `chat.render` returned, in which placeholders stand for text.

        Raises InputError where the tokenizer cannot encode the name of a control token as text.
        """
        tokens = self.chat.control_tokens
        return tokens.encode(text) if tokens.has_placeholder(text) else self.encode(text, special=False)

    def check_raw(self) -> None:
        """Raise InputError where prompts may not be raw text: no system prompt can be added to it."""
        if self.chat.options.system_prompt is not None:
            raise InputError(NO_SYSTEM_PROMPT)

    def encode_raw(self, text: str) -> list[int]:
        """Return the token ids of a raw prompt, in which the names of special tokens are tokens.

        What the tokenizer puts before a sequence (BOS) stands there once, also where the text begins with its name;
        what it puts after a sequence (EOS) is left out, because a response follows.
        """
        ids = self.encode(text, special=False)
        before = self._ids_before_text
        return [*before, *ids] if before and ids[:1] != before[:1] else ids

    def split_end(self, text: str) -> tuple[str, int | None]:
        """Return a response without the names of end tokens at its end, and the id of the first of these.

        The id is None, and the text unchanged, where the response does not end in such a name.
        """
        end = None
        while True:
            trimmed = text.rstrip()
            name = next((name for name in self.end_names if trimmed.endswith(name)), None)
            if name is None:
                return text, end
            text, end = trimmed.removesuffix(name), self.end_names[name]

    def encode_plain(self, text: str) -> list[int]:
        """Return the token ids of a text in which the names of special tokens are ordinary characters.

        Raises InputError on half of a surrogate pair, which is no character.
        """
        require_characters(text)
        return [int(i) for i in self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of some tokens, without special tokens."""
        return str(self.hf.decode(list(token_ids), skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        """Return the text of one token by itself, in which delimiters are searched."""
        text = self._token_text.get(token_id)
        if text is None:
            text = self._token_text[token_id] = str(self.hf.decode([token_id]))
        return text

    def ids_of_text(self, text: str) -> list[int]:
        """Return the ids of all tokens whose text by itself is this one."""
        return self._ids_of_texts.get(text, [])

    @cached_property
    def _ids_of_texts(self) -> dict[str, list[int]]:
        """Ids of the vocabulary by their texts."""
        ids: dict[str, list[int]] = {}
        for token_id in range(self.largest_id + 1):
            ids.setdefault(self.token_text(token_id), []).append(token_id)
        return ids

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text that each token completes; joined, it is the whole text. Special tokens have their names."""
        stream = open_stream(self)
        pieces = [stream.push(token) for token in token_ids]
        if pieces:
            pieces[-1] += stream.rest()
        return pieces

    @cached_property
    def texts_join(self) -> bool:
        """Whether the texts of tokens join to the text of all. SentencePiece drops the space before the first one."""
        spaced = next((i for piece, i in self.hf.get_vocab().items() if piece[:1] == "\u2581" and len(piece) > 1), None)
        return spaced is None or str(self.hf.decode([spaced, spaced])) == 2 * self.token_text(spaced)

    @cached_property
    def _ids_before_text(self) -> list[int]:
        """Tokens that the tokenizer puts before a sequence: the BOS, or none."""
        with_special, ids = self.encode("a", special=True), self.encode("a", special=False)
        starts = range(len(with_special) - len(ids) + 1)
        return with_special[: next((i for i in starts if with_special[i : i + len(ids)] == ids), 0)]

    @cached_property
    def end_names(self) -> dict[str, int]:
        """Names and ids of the special tokens that end a response or, in the chat template, the assistant's turn."""
        added = {str(name): int(i) for name, i in self.hf.get_added_vocab().items()}
        names = [name for name, i in added.items() if i in self.end_token_ids]
        if self.chat.exists:
            after = self.chat.write_after([{"role": "user", "content": "a"}]) or ""
            positions = {name: after.find(name) for name in added if name in after}
            names += sorted(positions, key=lambda name: (positions[name], -len(name)))[:1]
        return {name: added[name] for name in names}

    def _check_ids(self, parts: Sequence[Any]) -> list[int]:
        """Return a prompt's parts as token ids. Raises InputError on anything else."""
        try:
            if any(isinstance(part, bool) for part in parts):
                raise TypeError
            ids = [operator.index(part) for part in parts]
        except TypeError:
            raise InputError(PROMPT_KINDS) from None
        wrong = [i for i in ids if not 0 <= i <= self.largest_id]
        if wrong:
            raise InputError(f"token id {wrong[0]} is not in the vocabulary of {self.directory}")
        return ids


def _load_tokenizer(directory: Path) -> Any:
    """Return the tokenizer object of transformers. Raises CheckpointError where it cannot be loaded.

    No Python file of the checkpoint is run, and nothing is fetched.
    """
    for name in TOKENIZER_FILES:
        refuse_pointer(directory / name)
    path = directory / "config.json"
    fields = read_fields(path) if path.is_file() else {}
    # transformers would read the config again, and refuse fields of older versions
    options = {"config": make_transformers_config(fields, path)} if is_known_to_transformers(fields) else {}
    try:
        hf = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True, **options)
        probe = str(hf.decode(hf.encode(PROBE, add_special_tokens=False)))
    except Exception as error:  # tokenizer classes raise what the parsing of their files does
        if "trust_remote_code" in str(error):
            raise CheckpointError(
                f"{directory}: the tokenizer needs a Python file of the checkpoint (auto_map), which is never run: use "
                "a checkpoint whose tokenizer is one of transformers' own classes"
            ) from None
        raise CheckpointError(f"{directory} has no tokenizer that transformers can load: {one_line(error)}") from None
    if len(probe.split()) < len(PROBE.split()) and "".join(probe.split()) == "".join(PROBE.split()):
        raise CheckpointError(
            f"{directory}: the tokenizer class {type(hf).__name__} loses spaces ({PROBE!r} becomes {probe!r}): set "
            "tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast, which takes tokenizer.json as it is"
        )
    return hf


def require_characters(text: str) -> None:
    """Raise InputError on half of a surrogate pair, which Python's strings can hold and no file or tokenizer can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise InputError(f"half of a surrogate pair ({half} at character {error.start}) is no text") from None


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix of two sequences."""
    for count, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return count
    return min(len(first), len(second))


def as_messages(prompt: Prompt) -> Messages | None:
    """Return a prompt that is a list of chat messages; None for any other. Raises InputError on what is no prompt."""
    if isinstance(prompt, str):
        return None
    parts = _parts(prompt)
    return parts if parts and all(isinstance(part, Mapping) for part in parts) else None


def _parts(prompt: Any) -> list[Any]:
    """Return the elements of a prompt that is not a string: a list, a tuple, an array."""
    try:
        return list(prompt)
    except TypeError:
        raise InputError(PROMPT_KINDS) from None
