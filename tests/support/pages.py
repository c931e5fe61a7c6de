"""The data in a page of `genssd report`, read without the page's own code."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

PIECE = re.compile(r'<script type="text/plain" id="([a-z0-9-]+)">([A-Za-z0-9+/=]*)</script>')


def read_page(path: Path) -> dict[str, Any]:
    """Return the pieces of data of a page by their names."""
    pieces = PIECE.findall(path.read_text())
    return {name: json.loads(gzip.decompress(base64.b64decode(content))) for name, content in pieces}


def list_trees(page: dict[str, Any], run: int = 0) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the prompts of a run: the line of the list, and the tree."""
    return [(entry, page[f"tree-{run}-{i}"]) for i, entry in enumerate(page[f"list-{run}"])]
