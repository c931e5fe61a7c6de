"""Two tokenizers compared: which ids mean the same text, and how a model reads the tokens that another one writes.

Two tokenizers match when text alone cannot tell them apart: the same vocabulary, merges, normalizer, pre-tokenizer and
decoder. Added tokens (ends, roles, tags of thoughts and tools) may differ. A reader takes an added token of the writer

* by its own id of the same string, else
* as its own end of sequence, where the token ends the writer's responses, else not at all: a response with it is
  refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import quote
from genssd.engine.readers.ends import choose_end
from genssd.engine.readers.reading import Reading
from genssd.engine.texts.text import Tokenizer

NUM_LISTED = 4
"""Maximum number of tokens that a message lists."""
PARTS = ("normalizer", "pre_tokenizer", "decoder")
"""Parts of tokenizer.json, next to the model, that decide what text becomes which ids and back."""
IRRELEVANT_OPTIONS = ("trim_offsets",)
"""Options of a part that change no id and no text."""


class DifferentTokenizers(InputError):
    """Two tokenizers that differ in more than added tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMap:
    """The ids by which one model reads the tokens that another one writes. The default maps every id to itself."""

    writer: str = ""
    """Role and name of the model that writes, for messages."""
    reader: str = ""
    """Role and name of the model that reads."""
    strings: Mapping[int, str] = field(default_factory=dict)
    """The writer's strings of the ids that the reader does not have with the same string."""
    replaced: Mapping[int, int] = field(default_factory=dict)
    """The reader's id for some of these ids. The reader cannot read the others."""
    conflicts: Mapping[int, str] = field(default_factory=dict)
    """The reader's strings of those of these ids that it has, too."""
    reads_bytes: bool = False
    """Whether the reader divides the text into tokens of its own."""

    @property
    def is_identity(self) -> bool:
        """Whether every id of the writer means the same to the reader."""
        return not self.strings

    def translate(self, token_ids: Sequence[int], label: str) -> list[int]:
        """Return the reader's ids of the writer's tokens, one for one.

        Raises InputError, with the label in its message, on a token that the reader does not have.
        """
        if self.is_identity:
            return list(token_ids)
        if (missing := self.find_missing(token_ids)) is not None:
            raise InputError(f"{label}: the {self.writer} wrote {self.describe_missing(missing)}")
        return [self.replaced.get(i, i) for i in token_ids]

    def read(self, token_ids: Sequence[int], *, held: bytes = b"", begins: bool = True, ends: bool = True) -> Reading:
        """Return what the reader reads of a chunk: as many tokens as the writer wrote. Raises InputError as above."""
        return Reading(ids=tuple(self.translate(token_ids, "the response")))

    def find_missing(self, token_ids: Sequence[int]) -> int | None:
        """Return the first of the writer's tokens that the reader does not have; None where it reads them all."""
        return next((i for i in token_ids if i in self.strings and i not in self.replaced), None)

    def check_same(self, token_ids: Sequence[int], label: str) -> None:
        """Check that the reader has the writer's tokens under the same ids.

        Raises InputError, with the label in its message, on one that it does not have.
        """
        if (fault := self.find_fault(token_ids)) is not None:
            raise InputError(f"{label}: {fault}")

    def find_fault(self, token_ids: Sequence[int]) -> str | None:
        """Return which token the reader does not have under the same id, and the remedy; None where it has all."""
        missing = None if self.is_identity else next((i for i in token_ids if i in self.strings), None)
        return None if missing is None else f"the {self.writer} wrote {self.describe_missing(missing)}"

    def describe_missing(self, token_id: int) -> str:
        """Return which token the reader does not have, and the remedy, as the end of a sentence."""
        name = quote(self.strings[token_id])
        return (
            f"the token {self.name_token(token_id)}, which the tokenizer of the {self.reader} does not have. Add it "
            f"there (add_tokens([{name}]) and save_pretrained of its transformers tokenizer, with an id that the "
            "embedding has a row for), or choose another pair"
        )

    def name_token(self, token_id: int) -> str:
        """Return the string and the id of a token that the reader does not have."""
        return f"{quote(self.strings[token_id])} (id {token_id})"

    def check_no_conflict(self) -> None:
        """Check that no id means two things, so that distributions over ids compare. Raises InputError else."""
        if self.conflicts:
            raise InputError(
                f"the {self.writer} and the {self.reader} use the same ids for different tokens: "
                f"{_list(_describe_conflict(i, self.strings[i], name) for i, name in self.conflicts.items())}; their "
                "distributions do not compare token by token"
            )

    def describe(self) -> str:
        """Return one line that lists the added tokens which differ, and how the reader takes them."""
        names = {i: f"{quote(name)} (id {i})" for i, name in self.strings.items()}
        read = [f"{name} is read as id {self.replaced[i]}" for i, name in names.items() if i in self.replaced]
        refused = [name for i, name in names.items() if i not in self.replaced]
        parts = [_list(read, limit=2 * NUM_LISTED)] if read else []
        if refused:
            parts.append(
                f"a prompt fails when the {self.writer.partition(' ')[0]} writes {_list(refused, limit=2 * NUM_LISTED)}"
            )
        return f"the {self.writer} and the {self.reader} have different added tokens: {'; '.join(parts)}"


def match_tokenizers(writer: Tokenizer, reader: Tokenizer, writer_name: str, reader_name: str) -> TokenMap:
    """Return how the model of one tokenizer reads the tokens that the model of another one writes.

    The names say role and model ("teacher Qwen/Qwen3-8B"). Raises DifferentTokenizers where the tokenizers differ in
    more than added tokens; the message lists ids that mean different text.
    """
    state, reader_state = _serialize(writer), _serialize(reader)
    if state is not None and state == reader_state:
        return TokenMap(writer=writer_name, reader=reader_name)
    strings, reader_strings = _strings_by_id(writer), _strings_by_id(reader)
    added, reader_added = set(writer.hf.get_added_vocab().values()), set(reader.hf.get_added_vocab().values())
    differing = {i: name for i, name in strings.items() if reader_strings.get(i) != name}
    regular = [i for i in differing if i not in added or (i in reader_strings and i not in reader_added)]
    if regular:
        raise DifferentTokenizers(
            f"{writer_name} and {reader_name} have different vocabularies: "
            f"{_list(_describe_conflict(i, strings.get(i), reader_strings.get(i)) for i in sorted(regular))}; one "
            "model reads the token ids of the other, so both need the same tokenizer (added tokens may differ)"
        )
    fault = _find_difference(writer, reader, added | reader_added)
    if fault is not None:
        raise DifferentTokenizers(
            f"{writer_name} and {reader_name} have the same vocabulary and make different tokens of the same text: "
            f"{fault}; one model reads the token ids of the other, so both need the same tokenizer"
        )
    ids_of_added = {name: i for i, name in reader_strings.items() if i in reader_added}
    replaced = {i: ids_of_added[name] for i, name in differing.items() if name in ids_of_added}
    end = choose_end(reader)
    if end is not None:
        replaced |= {i: end for i in differing if i in writer.end_token_ids and i not in replaced}
    return TokenMap(
        writer=writer_name,
        reader=reader_name,
        strings=differing,
        replaced=replaced,
        conflicts={i: reader_strings[i] for i in differing if i in reader_strings},
    )


def _serialize(tokenizer: Tokenizer) -> str | None:
    """Return a tokenizer as the text of tokenizer.json; None where it is written in Python."""
    backend = getattr(tokenizer.hf, "backend_tokenizer", None)
    return None if backend is None or not hasattr(backend, "to_str") else str(backend.to_str())


def _strings_by_id(tokenizer: Tokenizer) -> dict[int, str]:
    vocabulary = {int(i): str(name) for name, i in tokenizer.hf.get_vocab().items()}
    return dict(sorted(vocabulary.items()))


def _find_difference(writer: Tokenizer, reader: Tokenizer, added: set[int]) -> str | None:
    """Return the first part in which two tokenizers with the same regular vocabulary differ; None where they agree."""
    first, second = _read_parts(writer, added), _read_parts(reader, added)
    for name in sorted(first.keys() | second.keys()):
        one, other = first.get(name), second.get(name)
        if one == other:
            continue
        if name not in ("merges", "pieces") or not one or not other:
            return f"{name} is {quote(one)} in one and {quote(other)} in the other"
        place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            return f"{len(one)} {name} in one and {len(other)} in the other"
        ids = {str(token): i for token, i in writer.hf.get_vocab().items()}
        entries = [_describe_entry(entry, ids) for entry in (one[place], other[place])]
        return f"{name}[{place}] is {entries[0]} in one and {entries[1]} in the other"
    return None


def _describe_entry(entry: Any, ids: Mapping[str, int]) -> str:
    """Return a merge, a piece or a piece with its score, and the id of the token that it makes."""
    texts = [part for part in (entry if isinstance(entry, list) else [entry]) if isinstance(part, str)]
    token_id = ids.get("".join(texts))
    return quote(entry) + ("" if token_id is None else f" (id {token_id})")


def _read_parts(tokenizer: Tokenizer, added: set[int]) -> dict[str, Any]:
    """Return what decides which tokens a text becomes, in one form for settings that mean the same."""
    text = _serialize(tokenizer)
    if text is None:  # its class is its rules
        return {"tokenizer class": type(tokenizer.hf).__name__}
    state = json.loads(text)
    model = state["model"]
    vocabulary = model.pop("vocab", None)
    parts = {name: value if isinstance(value, list) else value or None for name, value in model.items()}
    if isinstance(vocabulary, list):  # pieces with scores
        parts["pieces"] = [piece for i, piece in enumerate(vocabulary) if i not in added]
    elif model.get("type") != "BPE":  # no merges: every entry is a token that text can become
        parts["pieces"] = [piece for piece, i in sorted((vocabulary or {}).items()) if i not in added]
    parts |= {name: _simplify(state.get(name)) for name in PARTS}
    if isinstance(parts["decoder"], dict) and parts["decoder"].get("type") == "ByteLevel":
        parts["decoder"] = "ByteLevel"  # its options are those of the pre-tokenizer
    return parts


def _simplify(part: Any) -> Any:
    """Return a part of tokenizer.json without what changes nothing: sequences of sequences, options of offsets."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence":
        name = next(key for key in part if key != "type")
        steps = [_simplify(step) for step in part[name]]
        flat = [one for step in steps for one in (step if isinstance(step, list) else [step]) if one is not None]
        return flat[0] if len(flat) == 1 else flat or None
    return {key: value for key, value in part.items() if key not in IRRELEVANT_OPTIONS}


def _describe_conflict(token_id: int, name: str | None, other: str | None) -> str:
    texts = ["no token" if text is None else quote(text) for text in (name, other)]
    return f"id {token_id} is {texts[0]} in one and {texts[1]} in the other"


def _list(items: Any, *, limit: int = NUM_LISTED) -> str:
    """Return the first items of a message's list, and the number of the others."""
    listed = list(items)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
