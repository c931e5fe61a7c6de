"""Amounts in messages: numbers of bytes in a unit that reads well."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Return a number of bytes in the largest unit that it reaches: 512 bytes, 1.5 KiB, 64.0 MiB, 2.1 GiB."""
    if count < 1024:
        return f"{count:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1023.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"
