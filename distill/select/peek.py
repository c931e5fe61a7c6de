"""`--peek`: the search of one prompt, round by round, as plain lines while it runs.

Lines are logged, so that those of a worker process reach the console as well.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from genssd.engine.common.outcomes import KEPT
from genssd.engine.common.quoting import quote
from genssd.engine.engine import Engine
from genssd.engine.search.selection import CandidateRecord, RoundRecord

logger = logging.getLogger("genssd.peek")


class Peek:
    """A `Watch` that logs the rounds of one prompt. index: of the prompt in the call. where: its place, for the lines.

    engine: whose teachers write.
    """

    def __init__(self, engine: Engine, index: int, where: str) -> None:
        self._tokenizers = [one.tokenizer("teacher") for one in engine.teachers]
        self._index = index
        self._where = where

    def __call__(self, index: int, candidates: Sequence[CandidateRecord], round_: RoundRecord) -> None:
        """Log an attempt at a round, if it is one of the prompt: the candidates, the kept ones first."""
        if index != self._index:
            return
        attempt = f", attempt {round_.attempt + 1}" if round_.attempt else ""
        kept = sum(one.verdict in KEPT for one in candidates)
        lines = [f"{self._where}, round {round_.round + 1}{attempt}: {kept} of {len(candidates)} kept"]
        lines += map(self._describe, sorted(candidates, key=lambda one: one.verdict not in KEPT))
        logger.info("%s", "\n".join(lines))

    def _describe(self, candidate: CandidateRecord) -> str:
        text = self._tokenizers[candidate.teacher].decode(candidate.token_ids)
        is_kept = candidate.verdict in KEPT
        end = ", the end" if candidate.ended in ("finished", "stopped") else ""
        return f"  {'+' if is_kept else '-'} {candidate.score:.4g} {candidate.verdict}{end}: {quote(text)}"
