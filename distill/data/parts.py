"""A part of a data file: `--shard 2/8` takes every eighth row, the second of them first."""

from __future__ import annotations

import re
from dataclasses import dataclass

from genssd.engine.common.errors import InputError

SHARD = re.compile(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows number - 1, number - 1 + count, number - 1 + 2 count, ... of a file, counted from 0."""

    number: int
    count: int

    @staticmethod
    def parse(text: str | None) -> Shard:
        """Return the shard that an option names, such as 2/8; all rows for None. Raises InputError on other text."""
        if text is None:
            return Shard(1, 1)
        match = SHARD.fullmatch(text)
        if match is None or int(match[1]) > int(match[2]):
            raise InputError(f"shard must be NUMBER/COUNT with a number from 1 to the count, such as 2/8, not {text!r}")
        return Shard(int(match[1]), int(match[2]))

    def has(self, index: int) -> bool:
        """Return whether a row belongs to the shard. index: of the row, from 0."""
        return index % self.count == self.number - 1
