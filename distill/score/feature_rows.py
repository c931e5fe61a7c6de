"""The rows of the journal of `genssd score`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FeatureRow = Mapping[str, Any]
"""A line of features.jsonl, see score/run.py."""
