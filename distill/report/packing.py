"""The page's data: pieces of JSON, each compressed by itself and read by the browser when it is shown."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

HUNDREDTHS = 100
"""Steps per nat to which surprisals and entropies are rounded in the page."""


def pack(name: str, value: Mapping[str, Any] | Sequence[Any]) -> Markup:
    """Return an element that holds a value as gzip in base 64, in which no character means anything to HTML."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: half of a surrogate pair is escaped
    content = base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()
    return Markup('<script type="text/plain" id="{}">{}</script>\n').format(name, Markup(content))


def round_numbers(values: Any, factor: float = HUNDREDTHS) -> list[int | None]:
    """Return numbers times a factor as integers, which compress well; None for those that are not finite."""
    scaled = np.rint(np.asarray(values, dtype=np.float64) * factor)
    finite = np.isfinite(scaled)
    if finite.all():
        return list(map(int, scaled.tolist()))
    return [int(value) if is_finite else None for value, is_finite in zip(scaled.tolist(), finite, strict=True)]
