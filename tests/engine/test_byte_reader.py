"""A student with another tokenizer: its tokens of a text in pieces are those of the whole text, and spell its bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.byte_tokenizers import KINDS, SPECIAL, TEXTS, build, save
from support.tokenizer_families import edit_tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer

from genssd.engine.readers.byte_reader import ByteReader
from genssd.engine.readers.reading import Reading
from genssd.engine.readers.token_bytes import ByteTable, NoByteTable
from genssd.engine.setup.loading import choose_reader
from genssd.engine.texts.text import Tokenizer

TAGS = ("<think>", "</think>")
Tokenizers = dict[str, Tokenizer]


def load(directory: Path, backend: RawTokenizer) -> Tokenizer:
    return Tokenizer(save(directory, backend))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    root = tmp_path_factory.mktemp("kinds")
    loaded = {kind: Tokenizer(save(root / kind, build(kind))) for kind in KINDS}
    # one token for every byte and a few that end within a character
    return {**loaded, "bytes": Tokenizer(save(root / "bytes", build("qwen", size=300)))}


@pytest.fixture(scope="module")
def readers(tokenizers: Tokenizers) -> dict[str, ByteReader]:
    """Every kind as the student of a teacher whose tokens are mostly single bytes."""
    return {kind: ByteReader.of(tokenizers["bytes"], tokenizers[kind], "teacher", kind) for kind in KINDS}


def read_in_pieces(reader: ByteReader, ids: list[int], cuts: list[int], *, ends: bool = True) -> list[Reading]:
    readings: list[Reading] = []
    edges = [0, *cuts, len(ids)]
    for start, end in pairwise(edges):
        held = readings[-1].held if readings else b""
        is_last = ends and end == len(ids)
        readings.append(reader.read(ids[start:end], held=held, begins=not readings, ends=is_last))
    return readings


ALPHABET = st.sampled_from(
    [
        *"abcTHE the student's", "'s", "'ll", "n't", *"0123456789", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n",
        " \n ", *"+-*/=()[]{}<>$\\^_.,;:!?\"", "\\frac{", "数", "学", "です。", "، ", "مرحبا", "٤", "é", "e\u0301",
        "o\u0308\u0323", "\u1112\u1161\u11ab", "🙂", "👩\u200d👩\u200d👧", "🇫🇷", "\u2581", "\u00a0", "\u3000", "ß", "Ω",
        "\u200f", "<end>", "<th", "ink>", "\ufffd", "\u0301", *TEXTS,
    ]
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(ALPHABET, min_size=1, max_size=25), seed=st.integers(0, 1 << 30))
def test_pieces_of_text_have_the_tokens_of_the_whole(
    readers: dict[str, ByteReader], tokenizers: Tokenizers, kind: str, parts: list[str], seed: int
) -> None:
    """Against the student's tokenizer, which encodes the whole text; decoding the ids gives the text back."""
    text, reader, student = "".join(parts), readers[kind], tokenizers[kind]
    ids = tokenizers["bytes"].encode_plain(text)
    text = reader.table.join(ids).decode()  # as the teacher writes it, composed
    generator = random.Random(seed)
    cuts = sorted(generator.sample(range(len(ids)), min(len(ids) - 1, generator.choice([1, 3, 12, 40]))))
    readings = read_in_pieces(reader, ids, [cut for cut in cuts if cut])
    read = [i for reading in readings for i in reading.ids]
    if kind not in ("llama2", "mistral"):  # these put a space before a text that begins
        assert read == student.encode_plain(text)
    assert tuple(read) == reader.read(ids, held=b"", begins=True, ends=True).ids
    own = ByteTable.of(student, kind)
    assert (
        own.join(read).decode() == text.replace("\u2581", " ")
        if own.alphabet == "pieces"
        else own.join(read) == text.encode()
    )
    num_bytes = sum(sum(reading.lengths or ()) for reading in readings)
    assert num_bytes == sum(sum(reading.writer_lengths or ()) for reading in readings) == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes(readers: dict[str, ByteReader], tokenizers: Tokenizers, kind: str) -> None:
    """Bytes that form no character keep their values, where the student has a token for them."""
    reader, own = readers[kind], ByteTable.of(tokenizers[kind], kind)
    generator = random.Random(kind)
    singles = reader.table.list_single_bytes()
    for _ in range(60):
        ids = [singles[generator.choice([generator.randrange(256), 0x41, 0xE2, 0x96, 0x81])] for _ in range(40)]
        cuts = sorted(generator.sample(range(1, 40), 8))
        readings = read_in_pieces(reader, ids, cuts)
        read = [i for reading in readings for i in reading.ids]
        assert tuple(read) == reader.read(ids, held=b"", begins=True, ends=True).ids
        written = reader.table.join(ids)
        assert sum(sum(reading.lengths or ()) for reading in readings) == len(written)
        if b"\xe2\x96\x81" not in written:  # a space to SentencePiece
            assert own.join(read) == written


def test_nothing_drifts_over_ten_thousand_chunks(readers: dict[str, ByteReader], tokenizers: Tokenizers) -> None:
    """Long responses in chunks of every size; and little is held back."""
    generator = random.Random(0)
    num_chunks, held = 0, []
    while num_chunks < 10_000:
        for kind, reader in readers.items():
            text = "".join(generator.choice(TEXTS)[generator.randrange(40) :] for _ in range(12))
            ids = tokenizers["bytes"].encode_plain(text)
            step = generator.choice([1, 2, 5, 9, 30])
            readings = read_in_pieces(reader, ids, list(range(step, len(ids), step)))
            whole = reader.read(ids, held=b"", begins=True, ends=True)
            assert tuple(i for reading in readings for i in reading.ids) == whole.ids, kind
            num_chunks += len(readings)
            held += [len(reading.held) for reading in readings]
    assert sum(held) / len(held) < 16
    assert max(held) < 160


def test_what_is_held_back_and_what_is_certain(readers: dict[str, ByteReader], tokenizers: Tokenizers) -> None:
    reader, teacher = readers["qwen"], tokenizers["bytes"]

    def read(text: str | bytes) -> Reading:
        data = text.encode() if isinstance(text, str) else text
        singles = reader.table.list_single_bytes()
        return reader.read([singles[byte] for byte in data], held=b"", begins=True, ends=False)

    assert read("the cat sat on").held == b" sat on"
    assert read("the 12 345").held == b"345"  # each digit is a word, and a run of digits is not cut
    assert read("the cat  ").held == b" cat  "
    face = "🙂".encode()
    assert read(b"the cat sat" + face[:2]).held.endswith(face[:2])
    # a chunk without anything certain is judged by its tokens as they stand
    short = read("th")
    assert (short.ids, short.held, short.is_provisional) == ((), b"th", True)
    assert short.judged_ids == tuple(tokenizers["qwen"].encode_plain("th"))
    assert short.judged_lengths == tuple(len(piece) for piece in tokenizers["qwen"].pieces(short.judged_ids))
    assert teacher.decode([]) == ""


def test_ends_tags_and_special_tokens(tmp_path: Path) -> None:
    """An end is the student's end; a tag is its own token of the student, or its characters; names are characters."""
    teacher = load(tmp_path / "teacher", build("qwen", TAGS, special=["<end>", "<turn>", "<tool>"]))
    student = load(tmp_path / "student", build("gemma", TAGS[:1], special=["<end>", "<stop>", "<turn>"]))
    reader = ByteReader.of(teacher, student, "teacher T", "student S")
    ids, own = teacher.hf.get_vocab(), student.hf.get_vocab()
    wrote = [ids["<think>"], *teacher.encode_plain("a <end> b"), ids["</think>"], ids["<turn>"], ids["<end>"]]
    reading = reader.read(wrote, held=b"", begins=True, ends=True)
    text = student.encode_plain("a <end> b</think>")
    assert reading.ids == (own["<think>"], *text, own["<turn>"], own["<end>"])
    assert own["<end>"] not in text
    assert reading.lengths is not None
    assert (reading.lengths[0], reading.lengths[-2:], sum(reading.lengths)) == (7, (0, 0), 7 + len("a <end> b</think>"))
    assert reader.find_missing([*wrote, ids["<tool>"]]) == ids["<tool>"]
    assert "the token '<tool>' (id" in reader.describe_missing(ids["<tool>"])
    assert reader.find_missing([10**6]) == 10**6


def test_an_end_under_another_name_is_the_end_of_the_students_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}<turn>\n{% endfor %}"
    teacher = load(tmp_path / "teacher", build("qwen", special=["<end>", "<stop>"]))
    teacher.end_token_ids = frozenset([int(teacher.hf.convert_tokens_to_ids("<stop>"))])
    save(tmp_path / "student", build("gemma"), template=template)
    student = Tokenizer(tmp_path / "student")
    turn = int(student.hf.convert_tokens_to_ids("<turn>"))
    (stop,) = teacher.end_token_ids
    assert ByteReader.of(teacher, student, "t", "s").replaced[stop] == student.eos_token_id
    student = student.with_ends([turn])
    assert ByteReader.of(teacher, student, "t", "s").replaced[stop] == turn


def test_the_first_space_that_decoding_drops_is_no_text(tokenizers: Tokenizers) -> None:
    teacher = tokenizers["llama2"]
    reader = ByteReader.of(teacher, tokenizers["qwen"], "t", "s")
    ids = teacher.encode_plain("the answer")
    assert teacher.decode(ids) == "the answer"
    assert reader.read(ids, held=b"", begins=True, ends=True).ids == tuple(
        tokenizers["qwen"].encode_plain("the answer")
    )
    later = reader.read(ids, held=b"x", begins=False, ends=True)
    assert later.ids == tuple(tokenizers["qwen"].encode_plain("x the answer"))


@pytest.mark.parametrize("kind", KINDS)
def test_tables_against_decoding(tokenizers: Tokenizers, kind: str) -> None:
    tokenizer = tokenizers[kind]
    table, generator = ByteTable.of(tokenizer, kind), random.Random(1)
    assert set(table.special.values()) >= set(SPECIAL)
    for text in TEXTS:
        ids = tokenizer.encode_plain(text)
        assert table.join(ids).decode().removeprefix(" " if table.drops_first_space else "") == text
    for _ in range(50):
        ids = generator.choices(sorted(table.bytes_of), k=9)
        decoded = tokenizer.decode(ids)
        if "\ufffd" not in decoded:
            assert table.join(ids).decode().removeprefix(" " if table.drops_first_space else "") == decoded


def set_part(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.update({name: value})


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NFKC, LOWER = {"type": "NFKC"}, {"type": "Lowercase"}
STRIP = {"type": "Strip", "strip_left": True, "strip_right": True}
REMOVED = {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Removed"}, BYTE_LEVEL]}
SUFFIXES = {"type": "BPEDecoder", "suffix": "</w>"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_part("normalizer", NFKC), "normalizer NFKC of the student S's tokenizer changes the text"),
        (set_part("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}, LOWER]}), "normalizer Lowercase"),
        (set_part("normalizer", STRIP), "normalizer Strip of"),
        (set_part("pre_tokenizer", REMOVED), "pre-tokenizer Punctuation of the student S's tokenizer removes char"),
        (set_part("decoder", SUFFIXES), r"decoder of the student S's tokenizer \(BPEDecoder\) does not spell"),
        (set_part("decoder", None), r"decoder of the student S's tokenizer \(none\) does not spell"),
        (lambda fields: fields["model"].update(dropout=0.5), "tokenizer of the student S drops merges at random"),
        (lambda fields: fields["model"].update(end_of_word_suffix="</w>"), "the student S mark words by '</w>'"),
    ],
)
def test_students_that_cannot_read_bytes_are_refused_by_name(
    tmp_path: Path, tokenizers: Tokenizers, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    save(tmp_path, build("qwen"))
    edit_tokenizer(tmp_path, edit)
    with pytest.raises(NoByteTable, match=message):
        ByteReader.of(tokenizers["gemma"], Tokenizer(tmp_path), "teacher T", "student S")
    with pytest.raises(
        Exception, match=rf"{message}.*, so the student S cannot read by bytes; .* different vocabularies"
    ):
        choose_reader(tokenizers["gemma"], Tokenizer(tmp_path), "teacher T", "student S")


def test_tokenizers_without_bytes_are_refused_by_name(tmp_path: Path, tokenizers: Tokenizers) -> None:
    words = RawTokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "<end>": 3}, unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    python = ByT5Tokenizer()
    python.save_pretrained(tmp_path / "byt5")
    for tokenizer, message in (
        (load(tmp_path / "words", words), "tokenizer of the teacher T is a WordPiece"),
        (Tokenizer(tmp_path / "byt5"), r"tokenizer of the teacher T \(ByT5Tokenizer\) is written in Python"),
    ):
        with pytest.raises(NoByteTable, match=message):
            ByteReader.of(tokenizer, tokenizers["qwen"], "teacher T", "student S")
