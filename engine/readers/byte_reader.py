"""A student that reads a teacher with another tokenizer: the same bytes of text, as tokens of its own.

The teacher's tokens are bytes of text (`token_bytes.py`), which the student's tokenizer divides anew
(`text_encoder.py`). What is not certain at the end of a chunk is held back and read with the next chunk, so that every
token of the student is scored once. Tokens that are no text are read by what they mean:

* the teacher's end of sequence is the end that the student itself would write;
* an added token that the student has with the same string is that token;
* any other added token that is text, such as a tag of thoughts, is read as its characters;
* any other special token cannot be read: a response with it is refused.

Names of special tokens in the text are characters for both.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import quote
from genssd.engine.readers.ends import choose_end
from genssd.engine.readers.reading import Reading
from genssd.engine.readers.text_encoder import TextEncoder
from genssd.engine.readers.token_bytes import ByteTable, NoByteTable
from genssd.engine.readers.token_map import DifferentTokenizers, TokenMap, match_tokenizers
from genssd.engine.texts.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteReader:
    """How a student reads the bytes that another model writes."""

    writer: str
    """Role and name of the model that writes, for messages."""
    reader: str
    """Role and name of the model that reads."""
    encoder: TextEncoder = field(repr=False)
    """Tokenizer of the model that reads."""
    table: ByteTable = field(repr=False)
    """Bytes of the writer's tokens."""
    replaced: Mapping[int, int]
    """The reader's id for each token of the writer that is not read as text."""
    names: Mapping[int, bytes] = field(default_factory=dict)
    """Text of these tokens, as far as they have any."""
    reads_bytes: bool = True
    """Whether the student divides the text into tokens of its own."""
    is_identity: bool = False
    """Whether every id of the writer means the same to the student."""

    @staticmethod
    def of(writer: Tokenizer, reader: Tokenizer, writer_name: str, reader_name: str) -> ByteReader:
        """Return how the model of one tokenizer reads the text of another one's.

        Raises NoByteTable, naming the model, where the tokens of one do not spell text, or where the reader's tokenizer
        changes it.
        """
        table, own = ByteTable.of(writer, writer_name), ByteTable.of(reader, reader_name)
        ids_of_added = {str(name): int(i) for name, i in reader.hf.get_added_vocab().items()}
        added = {int(i): str(name) for name, i in writer.hf.get_added_vocab().items()}
        replaced = {i: ids_of_added[name] for i, name in added.items() if name in ids_of_added}
        end = choose_end(reader)
        ends = [i for i in writer.end_token_ids if replaced.get(i) not in reader.end_token_ids]
        replaced |= {i: end for i in ends if end is not None}
        return ByteReader(
            writer=writer_name,
            reader=reader_name,
            encoder=TextEncoder(reader, own, reader_name),
            table=table,
            replaced=replaced,
            names={i: table.bytes_of[i] for i in replaced if i in table.bytes_of},
        )

    def find_missing(self, token_ids: Sequence[int]) -> int | None:
        """Return the first of the writer's tokens that the reader cannot read; None where it reads them all."""
        return next((i for i in token_ids if i not in self.table.bytes_of and i not in self.replaced), None)

    def describe_missing(self, token_id: int) -> str:
        """Return which token the reader cannot read, and the remedy, as the end of a sentence."""
        return (
            f"the token {self.name_token(token_id)}, which is no text and which the tokenizer of the {self.reader} "
            "does not have. Add it there (add_tokens and save_pretrained of its transformers tokenizer, with an id "
            "that the embedding has a row for), or choose another pair"
        )

    def name_token(self, token_id: int) -> str:
        """Return the string and the id of a token that the reader cannot read."""
        return f"{quote(self.table.special.get(token_id, ''))} (id {token_id})"

    def describe(self) -> str:
        """Return one line that says how the student reads."""
        return f"the {self.reader} reads the text of the {self.writer} by its bytes, as tokens of its own"

    def read(self, token_ids: Sequence[int], *, held: bytes, begins: bool, ends: bool) -> Reading:
        """Return what the reader reads of a chunk. held: bytes that were held back before it.

        begins, ends: whether the response begins or ends with the chunk. All token ids must be ones that
        `find_missing` does not find. Raises InputError on bytes that no token of the reader spells.
        """
        parts = _Parts(self.encoder, held)
        writer_lengths: list[int] = []
        for position, token in enumerate(token_ids):
            if token in self.replaced:
                name = self.names.get(token, b"")
                parts.add_token(self.replaced[token], len(name))
                writer_lengths.append(len(name))
                continue
            spelled = self.table.bytes_of[token]
            if begins and position == 0 and self.table.drops_first_space and len(spelled) > 1:
                spelled = spelled.removeprefix(b" ")
            parts.waiting += spelled
            writer_lengths.append(len(spelled))
        return parts.finish(tuple(writer_lengths), ends=ends)


def find_reader(writer: Tokenizer, reader: Tokenizer, writer_name: str, reader_name: str) -> TokenMap | ByteReader:
    """Return how the model of one tokenizer reads another model's tokens: by ids where they match, else by bytes.

    The names say role and model. Raises InputError where neither is possible.
    """
    try:
        return match_tokenizers(writer, reader, writer_name, reader_name)
    except DifferentTokenizers as difference:
        try:
            return ByteReader.of(writer, reader, writer_name, reader_name)
        except NoByteTable as error:
            raise InputError(f"{error}, so the {reader_name} cannot read by bytes; {difference}") from None


class _Parts:
    """The tokens of a chunk so far. waiting: bytes that are not divided into tokens yet."""

    def __init__(self, encoder: TextEncoder, held: bytes) -> None:
        self.waiting = bytearray(held)
        self._encoder = encoder
        self._ids: list[int] = []
        self._lengths: list[int] = []

    def add_token(self, token_id: int, length: int) -> None:
        """Add a token that is not read as text; the text before it is complete."""
        self._complete()
        self._ids.append(token_id)
        self._lengths.append(length)

    def finish(self, writer_lengths: tuple[int, ...], *, ends: bool) -> Reading:
        """Return the reading. ends: whether the response ends here, so that nothing is held back."""
        held_ids: Sequence[int] = ()
        held_lengths: Sequence[int] = ()
        held = b""
        if ends:
            self._complete()
        elif self.waiting:
            waiting = bytes(self.waiting)
            decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
            text = decoder.decode(waiting)  # the beginning of a character at the end is kept in the decoder
            encoded = self._encoder.encode(text, is_whole=False)
            num_certain = encoded.num_certain
            self._ids += encoded.ids[:num_certain]
            self._lengths += encoded.lengths[:num_certain]
            held = waiting[sum(encoded.lengths[:num_certain]) :]
            if not self._ids:
                whole = self._encoder.encode(waiting.decode(errors="surrogateescape"), is_whole=True)
                held_ids, held_lengths = whole.ids, whole.lengths
        return Reading(
            ids=tuple(self._ids),
            lengths=tuple(self._lengths),
            writer_lengths=writer_lengths,
            held=held,
            held_ids=tuple(held_ids),
            held_lengths=tuple(held_lengths),
        )

    def _complete(self) -> None:
        """Divide the waiting bytes into tokens, as no text follows them."""
        encoded = self._encoder.encode(bytes(self.waiting).decode(errors="surrogateescape"), is_whole=True)
        self._ids += encoded.ids
        self._lengths += encoded.lengths
        self.waiting = bytearray()
