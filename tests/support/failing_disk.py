"""A disk that refuses a write: the writes below a directory are counted, and from a given one on they fail."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError

WRITING = set("wax+")


class FailingDisk:
    """The writes below a directory: creating, writing, syncing, renaming, cutting. Use `patched`."""

    def __init__(self, root: Path, number: int | None = None, code: int = errno.ENOSPC, *, once: bool = False) -> None:
        """number: of the first write that fails, from 0; None: all succeed. once: only that one fails."""
        self._root = str(root)
        self._number = number
        self._code = code
        self._once = once
        self._descriptors: set[int] = set()
        self.count = 0
        """Number of writes that were tried."""
        self.has_failed = False
        """Whether a write was refused."""

    @contextmanager
    def patched(self) -> Iterator[FailingDisk]:
        """Patch what Python and safetensors write with."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("replace", "rename", "mkdir"):
                patch.setattr(os, name, self._checking(getattr(os, name), 0))
            patch.setattr(os, "open", self._open(os.open))
            patch.setattr(os, "close", self._close(os.close))
            patch.setattr(os, "write", self._write(os.write))
            patch.setattr(os, "fsync", self._fsync)
            opener = self._open_stream(io.open)
            patch.setattr(io, "open", opener)
            patch.setattr(builtins, "open", opener)
            patch.setattr(safetensors.torch, "serialize_file", self._serialize(safetensors.torch.serialize_file))
            yield self

    def _check(self, path: object) -> None:
        number, self.count = self.count, self.count + 1
        if self._number is not None and (number == self._number or (number > self._number and not self._once)):
            self.has_failed = True
            raise OSError(self._code, os.strerror(self._code), path)

    def _is_below(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and f"{os.fspath(path)}/".startswith(f"{self._root}/")

    def _checking(self, real: Any, place: int) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            path = arguments[place]
            if self._is_below(path) and not (real.__name__ == "mkdir" and os.path.isdir(path)):  # nothing is made there
                self._check(path)
            return real(*arguments, **options)

        return call

    def _open(self, real: Any) -> Any:
        def call(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if not self._is_below(path):
                return int(real(path, flags, *arguments, **options))
            if flags & os.O_CREAT:
                self._check(path)
            descriptor = int(real(path, flags, *arguments, **options))
            self._descriptors.add(descriptor)
            return descriptor

        return call

    def _close(self, real: Any) -> Any:
        def call(descriptor: int) -> None:
            self._descriptors.discard(descriptor)
            real(descriptor)

        return call

    def _write(self, real: Any) -> Any:
        def call(descriptor: int, content: bytes) -> int:
            if descriptor not in self._descriptors:
                return int(real(descriptor, content))
            try:
                self._check(None)
            except OSError:
                real(descriptor, content[: len(content) // 2])  # a disk that becomes full takes a part
                raise
            return int(real(descriptor, content[:1000] if self.count % 2 else content))

        return call

    def _fsync(self, descriptor: int) -> None:
        """Sync nothing: the tests cut no power."""
        if descriptor in self._descriptors:
            self._check(None)

    def _open_stream(self, real: Any) -> Any:
        def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if WRITING & {*mode} and self._is_below(file):
                self._check(file)
            return real(file, mode, *arguments, **options)

        return call

    def _serialize(self, real: Any) -> Any:
        def call(tensors: Any, filename: Any, *arguments: Any, **options: Any) -> Any:
            if self._is_below(filename):
                try:
                    self._check(filename)
                except OSError as error:
                    Path(filename).write_bytes(b"half of a file")
                    raise SafetensorError(f"Error while serializing: I/O error: {error.strerror}") from None
            return real(tensors, filename, *arguments, **options)

        return call
