"""The process that forks the ranks of trainings in several processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.ranks import Ranks, open_ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    with open_ranks() as opened:
        yield opened
