"""Data files of a directory or an object storage, read through Ray Data on the nodes of a cluster.

Ray Data fetches the files, many at a time: of a Parquet file the rows, of every other file the bytes, which the one
opener of data files (rows.py) then reads as it reads a local file, compressed or not. Every row keeps the name of its
file and its number there.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from genssd.distill.files.cluster_files import ClusterRow
from genssd.distill.files.rows import SUFFIXES, read_stream
from genssd.distill.files.tables import BATCH_ROWS, encode_batches
from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import one_line

PATH = "path"
"""Column in which Ray Data puts the name of a row's file."""
LOCAL_SCHEME = "local://"
"""Scheme with which Ray Data reads files of the machine of the command on that machine, and not on any node."""
HIDDEN = ("_", ".")
"""Beginnings of the names of files that hold no rows, such as _SUCCESS."""


class RayRows:
    """The `ClusterReader` of a Ray cluster, which keeps what it has read."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        """connect: returns the package Ray, connected with the cluster."""
        self._connect = connect
        self._read: dict[str, Sequence[ClusterRow]] = {}

    def read(self, name: str) -> Sequence[ClusterRow]:
        """Return all rows of a directory or a URL, which are read once; see `ClusterReader`."""
        if name not in self._read:
            self._read[name] = self._load(name)
        return self._read[name]

    def _load(self, name: str) -> Sequence[ClusterRow]:
        files = list_files(name)
        self._connect()
        data = importlib.import_module("ray.data")
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # which the import sets anew
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        tables = [file for file in files if _suffix(file) == ".parquet"]
        others = [file for file in files if _suffix(file) != ".parquet"]
        rows: dict[str, list[ClusterRow]] = {}
        try:
            if tables:
                for batch in data.read_parquet(tables, include_paths=True).iter_batches(
                    batch_size=None, batch_format="pyarrow"
                ):
                    _add_table(rows, batch, files)
            if others:
                for row in data.read_binary_files(others, include_paths=True).iter_rows():
                    file = _find_file(row[PATH], files)
                    rows[file] = list(_decode(row["bytes"], file))
        except InputError:
            raise
        except Exception as error:  # those of file systems and of Ray have no common base
            raise InputError(f"{name} cannot be read through Ray Data: {_shorten(error)}") from None
        return [row for file in files for row in rows.get(file, ())]


def list_files(name: str) -> list[str]:
    """Return the data files of a directory or a URL, in order, each as Ray Data takes it.

    Raises InputError where there is none, or where the place cannot be reached.
    """
    from pyarrow import fs

    is_local = os.path.isdir(name)
    scheme = LOCAL_SCHEME if is_local else f"{name.partition('://')[0]}://"
    try:
        system, path = (
            (fs.LocalFileSystem(), os.path.abspath(name)) if is_local else fs.FileSystem.from_uri(name.rstrip("/"))
        )
        info = system.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise InputError(f"{name} does not exist")
        selector = fs.FileSelector(path, recursive=True)
        paths = [path] if info.is_file else [one.path for one in system.get_file_info(selector) if one.is_file]
    except (OSError, ValueError) as error:  # of Arrow, whose errors derive from these, and InputError
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} cannot be listed: {one_line(error)[:300]}") from None
    paths = [one for one in paths if one == path or _holds_rows(one)]
    if not paths:
        raise InputError(f"{name} holds no data files ({', '.join(sorted(SUFFIXES))})")
    return [f"{scheme}{one}" for one in sorted(paths)]


def _holds_rows(path: str) -> bool:
    file = PurePosixPath(path)
    return file.suffix in SUFFIXES and not file.name.startswith(HIDDEN)


def _suffix(file: str) -> str:
    return PurePosixPath(file).suffix.lower()


def _find_file(path: str, files: Sequence[str]) -> str:
    """Return the file that Ray Data calls `path`, with or without its scheme."""
    return next(file for file in files if path in (file, file.partition("://")[2]))


def _shown(file: str) -> str:
    """Return the name of a file for messages."""
    return file.removeprefix(LOCAL_SCHEME)


def _add_table(rows: dict[str, list[ClusterRow]], table: Any, files: Sequence[str]) -> None:
    """Add the rows of a block, which may be of several files, to those of their files."""
    paths = table[PATH].to_pylist()
    table = table.drop_columns([PATH])
    start = 0
    while start < len(paths):
        end = next((i for i in range(start, len(paths)) if paths[i] != paths[start]), len(paths))
        file = _find_file(paths[start], files)
        own = rows.setdefault(file, [])
        part = table.slice(start, end - start)
        batches = part.to_batches(max_chunksize=BATCH_ROWS)
        for _, text in encode_batches(batches, _shown(file)):
            own.append(ClusterRow(file=_shown(file), unit="row", number=len(own) + 1, text=text))
        start = end


def _decode(content: bytes, file: str) -> Iterator[ClusterRow]:
    """Yield the rows in the bytes of a file. Raises InputError as `read_rows` does."""
    for unit, number, text in read_stream(io.BytesIO(content), _shown(file), file):
        yield ClusterRow(file=_shown(file), unit=unit, number=number, text=text)


def _shorten(error: Exception) -> str:
    """Return the cause of an error of a task as one line."""
    cause = getattr(error, "cause", None)
    return one_line(cause if isinstance(cause, Exception) else error)[:300]
