"""Data files of a directory or an object storage, whose bytes the one opener of data files (rows.py) reads.

Files of a directory are opened here, those of an object storage are fetched by Ray Data on the nodes of a cluster, many
at a time. Every row keeps the name of its file and its number there. Ray Data fetches bytes, of tables as well: its
reader of Parquet lists files in several threads, each of which tries to import an optional package (aiohttp, through
fsspec), and where that is missing, a thread that meets the failing import of another one ends the reading.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from genssd.distill.files.cluster_files import ClusterRow
from genssd.distill.files.rows import SUFFIXES, open_data_file, read_stream
from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import one_line

PATH = "path"
"""Column in which Ray Data puts the name of a row's file."""
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
        if os.path.isdir(name):
            return [row for file in files for row in _read_file(file)]
        self._connect()
        data = importlib.import_module("ray.data")
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # which the import sets anew
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        rows: dict[str, list[ClusterRow]] = {}
        try:
            for row in data.read_binary_files(files, include_paths=True).iter_rows():
                file = _find_file(row[PATH], files)
                rows[file] = list(_decode(io.BytesIO(row["bytes"]), file))
        except InputError:
            raise
        except Exception as error:  # those of file systems and of Ray have no common base
            raise InputError(f"{name} cannot be read through Ray Data: {_shorten(error)}") from None
        return [row for file in files for row in rows[file]]


def list_files(name: str) -> list[str]:
    """Return the data files of a directory or a URL, in order: paths, or URLs as Ray Data takes them.

    Raises InputError where there is none, or where the place cannot be reached.
    """
    from pyarrow import fs

    is_local = os.path.isdir(name)
    scheme = "" if is_local else f"{name.partition('://')[0]}://"
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


def _find_file(path: str, files: Sequence[str]) -> str:
    """Return the file that Ray Data calls `path`, with or without its scheme."""
    return next(file for file in files if path in (file, file.partition("://")[2]))


def _read_file(file: str) -> Iterator[ClusterRow]:
    """Yield the rows of a file of this machine. Raises InputError as `read_rows` does."""
    with open_data_file(file) as stream:
        yield from _decode(stream, file)


def _decode(stream: BinaryIO, file: str) -> Iterator[ClusterRow]:
    """Yield the rows in the bytes of a file. Raises InputError as `read_rows` does."""
    for unit, number, text in read_stream(stream, file, file):
        yield ClusterRow(file=file, unit=unit, number=number, text=text)


def _shorten(error: Exception) -> str:
    """Return the cause of an error of a task as one line."""
    cause = getattr(error, "cause", None)
    return one_line(cause if isinstance(cause, Exception) else error)[:300]
