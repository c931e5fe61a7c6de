"""The one opener of data files: rows of a file, a pipe or a data set of the hub, as JSON text, in whatever format.

    x.jsonl, x.json     a JSON object on every line; also from standard input (-) and pipes
    x.csv, x.tsv        a row of text cells; told by the name
    x.parquet, x.arrow  a row of the table; told by the first bytes
    any of the text files compressed with gzip, bzip2, xz or zstd; told by the first bytes
    ORG/NAME:SPLIT      a row of a data set of the hub, where no such path exists
    a directory, s3://  its files, one after the other, where the command has a cluster (cluster_files.py)

Every reader of problems, traces and training rows goes through `read_rows`, every comparison of data files through
`hash_content`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from genssd.distill.files.cluster_files import find_cluster_reader
from genssd.distill.files.compression import DamagedFileError, decompress
from genssd.distill.files.hub import HubName, parse_hub_name, read_hub
from genssd.distill.files.lines import BOM, iter_lines
from genssd.distill.files.pipes import STANDARD_INPUT, describe, open_pipe
from genssd.distill.files.tables import (
    ARROW_FILE,
    ARROW_STREAM,
    DELIMITERS,
    PARQUET,
    read_arrow,
    read_csv,
    read_parquet,
)
from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import one_line, quote

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
SUFFIXES = frozenset((".jsonl", ".json", ".parquet", ".arrow", ".txt", *DELIMITERS, *COMPRESSED_SUFFIXES))
"""Suffixes of names that are no data sets of the hub, although they have the form ORG/NAME."""
HEAD_BYTES = 16
UTF16, ZIP = (b"\xff\xfe", b"\xfe\xff"), b"PK\x03\x04"
MAX_LISTED = 5
"""Maximum number of files that the message on a directory lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """One row of a data file, not parsed yet."""

    number: int
    """Number of the row's line in its file, or, in a table, of the row; from 1."""
    where: str
    """Name of the file and number of the line or row, for messages."""
    text: bytes
    """JSON text of the row, without an end of line."""
    file: str | None = None
    """Name of the row's file, where a directory or an object storage was named; None where it is the name itself."""


def read_rows(name: str | Path) -> Iterator[RawRow]:
    """Yield the rows of a data file, blank lines left out.

    name: a path, `-` for standard input, or a data set of the hub (see hub.py). Raises InputError naming the file when
    it cannot be read or is damaged, and naming the line or row as well when that is what cannot be read.
    """
    cluster = find_cluster_reader(str(name))
    if cluster is not None:
        for row in cluster.read(str(name)):
            where = f"{row.file}, {row.unit} {row.number}"
            yield RawRow(number=row.number, where=where, text=row.text, file=row.file)
        return
    hub_name = _find_hub_name(name)
    shown = describe(str(name))
    if hub_name is not None:
        for number, text in read_hub(hub_name):
            yield RawRow(number=number, where=f"{shown}, row {number}", text=text)
        return
    with open_data_file(name) as stream:
        for unit, number, text in read_stream(stream, shown, name):
            yield RawRow(number=number, where=f"{shown}, {unit} {number}", text=text)


def read_stream(stream: BinaryIO, shown: str, name: str | Path) -> Iterator[tuple[str, int, bytes]]:
    """Yield the rows in the bytes of a data file: what they are called ("line" or "row"), their numbers and JSON texts.

    shown: name of the file, for messages. name: its name, whose suffix may tell its format. Raises InputError as
    `read_rows` does.
    """
    try:
        unit, rows = _read_format(stream, shown, _suffix(name))
        for number, text in rows:
            yield unit, number, text
    except DamagedFileError as error:
        raise InputError(f"{shown} is damaged or cut off: {one_line(error)}") from None
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {error.strerror}") from None


def hash_content(name: str | Path) -> str:
    """Return 16 hex digits that change with the bytes of a data file, or with the rows of a data set of the hub.

    Raises InputError when it cannot be read.
    """
    cluster, hub_name = find_cluster_reader(str(name)), _find_hub_name(name)
    if cluster is not None or hub_name is not None:
        digest = hashlib.sha256()
        for row in read_rows(name):
            digest.update(row.text + b"\n")
        return digest.hexdigest()[:16]
    with open_data_file(name) as stream:
        try:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:16]  # type: ignore[arg-type]
        except OSError as error:
            raise InputError(f"{describe(str(name))} cannot be read: {error.strerror}") from None


def find_hub_repository(name: str) -> str | None:
    """Return ORG/NAME of the data set of the hub that a name means; None where it is the name of a file."""
    hub_name = _find_hub_name(name)
    return None if hub_name is None else hub_name.repository


def open_data_file(name: str | Path) -> BinaryIO:
    """Return the bytes of a file or pipe, seekable.

    Raises InputError on what is neither, without opening it: a directory, a device, a socket.
    """
    if str(name) == STANDARD_INPUT:
        return open_pipe(STANDARD_INPUT)
    if not str(name):
        raise InputError("the name of a data file is empty")
    if "://" in str(name) and not os.path.lexists(name):
        raise InputError(
            f"{name} is a URL, which is not read; download it, or pipe it into the command, as --data -; on an object "
            "storage, such as s3://, it is read with --ray local"
        )
    try:
        mode = os.stat(name).st_mode
        if stat.S_ISREG(mode):
            return Path(name).open("rb")
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    except ValueError:  # a zero byte
        raise InputError(f"{quote(str(name))} cannot be read: it is no name of a file") from None
    if stat.S_ISFIFO(mode):
        return open_pipe(str(name))
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is a directory, not a data file{_list_files(Path(name))}")
    raise InputError(f"{name} is a device or a socket, not a data file; pipe its rows into the command, as --data -")


def check_exists(name: str) -> None:
    """Raise InputError where a name means a file, and there is none. Nothing is opened or looked up on the hub."""
    if name != STANDARD_INPUT and not os.path.lexists(name) and _find_hub_name(name) is None:
        open_data_file(name).close()  # raises


def stem_of(name: str | Path) -> str:
    """Return the name of a data file without folders and suffixes, "stdin" for standard input."""
    path = Path(name)
    if path.suffix in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return "stdin" if str(name) == STANDARD_INPUT else path.stem


def _find_hub_name(name: str | Path) -> HubName | None:
    return parse_hub_name(name, SUFFIXES) if isinstance(name, str) else None


def _suffix(name: str | Path) -> str:
    """Return the suffix of a name that tells its format, before that of its compression."""
    path = Path(name)
    return (path.with_suffix("") if path.suffix in COMPRESSED_SUFFIXES else path).suffix.lower()


def _list_files(directory: Path) -> str:
    """Return a hint that lists the data files in a directory."""
    try:
        names = sorted(path.name for path in directory.iterdir() if path.suffix in SUFFIXES)
    except OSError:
        return ""
    return f"; it holds {', '.join(names[:MAX_LISTED])}" if names else ""


def _read_format(stream: BinaryIO, name: str, suffix: str) -> tuple[str, Iterator[tuple[int, bytes]]]:
    """Return the numbered rows of a stream, after the word for what is numbered, "line" or "row"."""
    head = stream.read(HEAD_BYTES)
    stream.seek(0)
    if head.startswith(PARQUET):
        return "row", read_parquet(stream, name)
    if head.startswith((ARROW_FILE, ARROW_STREAM)):
        return "row", read_arrow(stream, name, is_stream=head.startswith(ARROW_STREAM))
    content = decompress(stream, head, name)
    if content is not None:
        head = content.peek(HEAD_BYTES)[:HEAD_BYTES]
    _refuse_other_formats(head, name, suffix, is_compressed=content is not None)
    text = content or stream
    if suffix in DELIMITERS:
        return "row", read_csv(text, name, DELIMITERS[suffix])
    return "line", ((number, line.rstrip(b"\r\n")) for number, line in iter_lines(text, name) if line.strip())


def _refuse_other_formats(head: bytes, name: str, suffix: str, *, is_compressed: bool) -> None:
    """Raise InputError on content that is no text."""
    if is_compressed and head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        raise InputError(
            f"{name} is a table that was compressed again; decompress it and name the Parquet or Arrow file"
        )
    if head.startswith(ZIP):
        raise InputError(f"{name} is a zip archive; unpack it and name the file in it")
    if head.startswith(UTF16) and not head.startswith(ARROW_STREAM):
        raise InputError(f"{name} is UTF-16 text; save it as UTF-8")
    if suffix == ".json" and head.removeprefix(BOM).lstrip().startswith(b"["):
        raise InputError(f"{name} is one JSON array, which is not read; write a row on every line: jq -c '.[]' {name}")
    if head and suffix in (".parquet", ".arrow"):
        raise InputError(f"{name} is no {suffix[1:].capitalize()} file: its first bytes are others")
