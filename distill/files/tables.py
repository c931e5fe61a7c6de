"""Tables as rows of JSON text: CSV and TSV by the standard library, Parquet and Arrow by pyarrow.

pyarrow comes with the `datasets` library. It reads the stream that `rows.py` has opened; `datasets` itself would
open the file again by its own rules, and copy it into its cache. A cell of a CSV file stays text, which `datasets`
would turn into numbers: "007" into 7.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from genssd.distill.files.lines import MAX_LINE_BYTES, iter_lines
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import one_line, quote

EXTRA = "pip install 'genssd[data]'"
BATCH_ROWS = 256
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
"""First bytes of the files."""
DELIMITERS: Mapping[str, str] = {".csv": ",", ".tsv": "\t"}


def read_parquet(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield the rows of a Parquet file as JSON objects, with their numbers, from 1. Raises InputError naming it."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise InputError(f"{name} is a Parquet file, which needs a package: {EXTRA}") from None
    try:
        batches = parquet.ParquetFile(stream).iter_batches(batch_size=BATCH_ROWS)
        yield from encode_batches(batches, name)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name} is damaged or cut off: {one_line(error)}") from None


def read_arrow(stream: BinaryIO, name: str, *, is_stream: bool) -> Iterator[tuple[int, bytes]]:
    """Yield the rows of an Arrow file as JSON objects, with their numbers, from 1. Raises InputError naming it.

    is_stream: whether the file has the stream format of Arrow IPC, as the cache of `datasets` has, not the file format.
    """
    try:
        import pyarrow
        from pyarrow import ipc
    except ModuleNotFoundError:
        raise InputError(f"{name} is an Arrow file, which needs a package: {EXTRA}") from None
    try:
        if is_stream:
            yield from encode_batches(ipc.open_stream(stream), name)
        else:
            reader = ipc.open_file(stream)
            yield from encode_batches(map(reader.get_batch, range(reader.num_record_batches)), name)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name} is damaged or cut off: {one_line(error)}") from None


def encode_batches(batches: Iterable[Any], name: str) -> Iterator[tuple[int, bytes]]:
    """Yield the rows of Arrow record batches or tables as JSON objects, with their numbers, from 1.

    Raises InputError naming the row whose values JSON cannot express, and one that is too large.
    """
    number = 0
    for batch in batches:
        repeated = [column for column in batch.schema.names if batch.schema.names.count(column) > 1]
        if repeated:
            raise InputError(f"{name} has two columns {quote(repeated[0])}; rename one")
        for start in range(0, batch.num_rows, BATCH_ROWS):
            try:
                rows = batch.slice(start, BATCH_ROWS).to_pylist()
            except (ValueError, OverflowError) as error:  # such as a time with nanoseconds
                raise InputError(f"{name}, rows {number + 1} and on: {one_line(error)}") from None
            for fields in rows:
                number += 1
                yield number, _encode(fields, f"{name}, row {number}")


def _encode(fields: Mapping[str, Any], where: str) -> bytes:
    """Return a row as JSON text. Raises InputError naming `where` when JSON cannot express it, or it is too large."""
    try:
        text = json.dumps(fields, ensure_ascii=False, default=_convert).encode()
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {one_line(error)}; leave the column out") from None
    if len(text) > MAX_LINE_BYTES:
        raise InputError(f"{where}: a row of more than {MAX_LINE_BYTES >> 20} MiB, the limit; leave it out")
    return text


def _convert(value: object) -> str:
    """Return a value that JSON does not have as text; raise TypeError or ValueError if it has no text."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{len(value)} bytes that are no UTF-8 text") from None
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return format(value, "f")
    if isinstance(value, uuid.UUID | datetime.timedelta):
        return str(value)
    raise TypeError(f"a value of the type {type(value).__name__} is no JSON")


def read_csv(stream: BinaryIO, name: str, delimiter: str) -> Iterator[tuple[int, bytes]]:
    """Yield the rows of a CSV file as JSON objects, with their numbers, from 1 for the row after the header.

    A cell is text; an empty one is absent. Raises InputError naming the row, or the line where there is no row.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(_decode(stream, name), delimiter=delimiter, strict=True)
    number = -1
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            number += 1
            if number == 0:
                header = cells
                _check_header(header, name)
                continue
            where = f"{name}, row {number}"
            if len(cells) != len(header):
                raise InputError(
                    f"{where}: {format_count(len(cells), 'cell')}, but the header has {len(header)} (line "
                    f"{reader.line_num})"
                )
            yield number, _encode({column: cell for column, cell in zip(header, cells, strict=True) if cell}, where)
    except csv.Error as error:
        raise InputError(f"{name}, row {number + 1}: no valid CSV: {error} (line {reader.line_num})") from None


def _decode(stream: BinaryIO, name: str) -> Iterator[str]:
    for number, line in iter_lines(stream, name):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}, line {number}: not UTF-8: {error.reason} at byte {error.start}") from None


def _check_header(header: list[str], name: str) -> None:
    for column in header:
        if not column.strip() or header.count(column) > 1:
            problem = "is empty" if not column.strip() else "occurs twice"
            raise InputError(f"{name}: the header must name every column once, but {quote(column)} {problem}")
