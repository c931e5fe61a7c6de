"""Compressed files: gzip, bzip2, xz and zstd, told by their first bytes, decompressed as they are read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from genssd.engine.errors import InputError

OPENERS: Mapping[re.Pattern[bytes], Callable[[BinaryIO], Any]] = {
    re.compile(rb"\x1f\x8b"): gzip.open,
    re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"): bz2.open,
    re.compile(rb"\xfd7zXZ\x00"): lzma.open,
}
"""Functions that open a compressed stream, by its first bytes."""
ZSTD = b"\x28\xb5\x2f\xfd"
BUFFER_BYTES = 1 << 16
ZSTD_PIECE_BYTES = 1 << 10
"""Number of compressed bytes that are decompressed at once; zstd makes at most 32 MiB of them."""

CORRUPTION_ERRORS: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
"""Errors of streams that are damaged or cut off; bzip2 raises an OSError without errno as well."""


def decompress(stream: BinaryIO, head: bytes, name: str) -> io.BufferedReader | None:
    """Return the decompressed content of a stream; None where its first bytes, `head`, are those of no known format.

    Reading raises one of CORRUPTION_ERRORS, or an OSError without errno, on a stream that is damaged or cut off. Raises
    InputError naming the file where zstd needs a package that is not installed.
    """
    if head.startswith(ZSTD):
        return io.BufferedReader(_ZstdReader(stream, _choose_zstd(name)), BUFFER_BYTES)
    for magic, open_compressed in OPENERS.items():
        if magic.match(head):
            return io.BufferedReader(open_compressed(stream), BUFFER_BYTES)
    return None


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


class _ZstdReader(io.RawIOBase):
    """Decompressed content of zstd frames. Unlike zstandard's own reader, it refuses a frame that is cut off."""

    def __init__(self, stream: BinaryIO, make_decompressor: Callable[[], Any]) -> None:
        self._stream = stream
        self._make_decompressor = make_decompressor
        self._frame: Any = None
        self._compressed = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            piece = self._compressed or self._stream.read(ZSTD_PIECE_BYTES)
            self._compressed = b""
            if not piece:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut off")
                return 0
            if self._frame is None:
                self._frame = self._make_decompressor()
            try:
                self._content = memoryview(self._frame.decompress(piece))
            except Exception as error:  # each of the two packages has a class of its own, without a common base
                raise EOFError(str(error)) from None
            if self._frame.eof:
                self._compressed = bytes(self._frame.unused_data)
                self._frame = None
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count
