"""The oracle of diagnosis: a small tree of responses whose successes are known one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ExactTree:
    """All responses of `depth` tokens. logits [A, A]: of the next token behind the last one; behind the prompt, row 0.

    wins: the responses that succeed. Everything is a sum over all responses: no recursion that ours could share.
    """

    logits: Floats
    depth: int
    wins: frozenset[Path]

    @staticmethod
    def random(letters: int, depth: int, seed: int, scale: float = 1.0) -> ExactTree:
        """Half of the responses succeed."""
        random = np.random.default_rng(seed)
        leaves = list(product(range(letters), repeat=depth))
        wins = frozenset(leaf for leaf in leaves if random.random() < 0.5)
        return ExactTree(scale * random.normal(size=(letters, letters)), depth, wins)

    def log_p(self, prefix: Path, nudges: Mapping[Path, Floats] | None = None) -> Floats:
        """Log-probabilities of the token behind a prefix; nudges are added to the logits of single nodes."""
        z = self.logits[prefix[-1] if prefix else 0] + (nudges or {}).get(prefix, 0.0)
        result: Floats = z - np.log(np.exp(z).sum())
        return result

    def success(self, prefix: Path, nudges: Mapping[Path, Floats] | None = None) -> float:
        """The chance that a response with this beginning succeeds, given the beginning."""
        total = 0.0
        for leaf in self.wins:
            if leaf[: len(prefix)] == prefix:
                total += float(
                    np.exp(sum(self.log_p(leaf[:t], nudges)[leaf[t]] for t in range(len(prefix), self.depth)))
                )
        return total

    def reach(self, prefix: Path) -> float:
        """The chance of a beginning."""
        return float(np.exp(sum(self.log_p(prefix[:t])[prefix[t]] for t in range(len(prefix)))))

    def success_after(self, prefix: Path) -> Floats:
        """Q: of every token behind the prefix."""
        return np.array([self.success((*prefix, token)) for token in range(len(self.logits))])

    def nodes(self) -> list[Path]:
        """All prefixes in front of a token."""
        return [prefix for t in range(self.depth) for prefix in product(range(len(self.logits)), repeat=t)]
