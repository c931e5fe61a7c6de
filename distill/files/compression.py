"""Compressed files: gzip, bzip2, xz and zstd, told by their first bytes, decompressed as they are read."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, BinaryIO

from genssd.engine.common.errors import InputError

MODULES: Mapping[str, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "lzma": re.compile(rb"\xfd7zXZ\x00"),
}
"""First bytes of a compressed file, by the module of the standard library that opens it."""
ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame of data, or one to skip (pzstd)
BUFFER_BYTES = 1 << 16
ZSTD_PIECE_BYTES = 1 << 10
"""Number of compressed bytes that are decompressed at once; zstd makes at most 32 MiB of them."""


class DamagedFileError(Exception):
    """A compressed stream that is damaged or cut off."""


def decompress(stream: BinaryIO, head: bytes, name: str) -> io.BufferedReader | None:
    """Return the decompressed content of a stream; None where its first bytes, `head`, are those of no known format.

    Reading it raises DamagedFileError, and OSError where the stream cannot be read. Raises InputError naming the file
    when the package or module that reads its format is not installed.
    """
    if ZSTD.match(head):
        return io.BufferedReader(_Content(_ZstdReader(stream, _choose_zstd(name))), BUFFER_BYTES)
    module_name = next((module for module, magic in MODULES.items() if magic.match(head)), None)
    if module_name is None:
        return None
    try:
        module = import_module(module_name)
    except ModuleNotFoundError:
        raise InputError(f"{name} is compressed, and this Python was built without its module {module_name}") from None
    return io.BufferedReader(_Content(module.open(stream)), BUFFER_BYTES)


def _choose_zstd(name: str) -> Callable[[], Any]:
    """Return a function that makes a decompressor of one zstd frame."""
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd.ZstdDecompressor
    try:
        import zstandard
    except ModuleNotFoundError:
        raise InputError(f"{name} is compressed with zstd, which needs a package: pip install zstandard") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj()


class _Content(io.RawIOBase):
    """Decompressed content whose errors are DamagedFileError, apart from those of the operating system."""

    def __init__(self, content: Any) -> None:
        self._content = content

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._content.readinto(buffer))
        except Exception as error:  # the modules raise errors of many kinds without a common base
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
                raise
            raise DamagedFileError(str(error)) from None


class _ZstdReader:
    """Decompressed content of zstd frames. Unlike zstandard's own reader, it refuses a frame that is cut off."""

    def __init__(self, stream: BinaryIO, make_decompressor: Callable[[], Any]) -> None:
        self._stream = stream
        self._make_decompressor = make_decompressor
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            piece = self._compressed or self._stream.read(ZSTD_PIECE_BYTES)
            self._compressed = b""
            if not piece:
                if self._frame is not None:
                    raise EOFError("the last zstd frame has no end")
                return 0
            if self._frame is None:
                self._frame = self._make_decompressor()
            self._content = memoryview(self._frame.decompress(piece))
            if self._frame.eof:
                self._compressed = bytes(self._frame.unused_data)
                self._frame = None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
