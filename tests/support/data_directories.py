"""A directory of data files in several formats."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
from pyarrow import parquet


def write_directory(directory: Path, num_tables: int = 2) -> None:
    """Make a directory of Parquet files of three problems each, and a compressed file in which a row is no problem.

    It also holds two files without rows. The compressed file comes first.
    """
    directory.mkdir()
    for number in range(num_tables):
        rows = [{"question": f"{i % 4}?", "answer": str(i)} for i in range(3 * number, 3 * number + 3)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), directory / f"t{number}.parquet")
    lines = [{"question": "7?", "answer": 7}, {"nothing": 1}, {"question": "8?"}]
    (directory / "a.jsonl.gz").write_bytes(gzip.compress("\n\n".join(map(json.dumps, lines)).encode()))
    (directory / "README.md").write_text("no rows")
    (directory / "_SUCCESS").write_text("")
