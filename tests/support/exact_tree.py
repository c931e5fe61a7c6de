"""Oracle for the tests of diagnosis: a small tree of responses, of which each is known to succeed or not."""

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
    """All responses of `depth` tokens over an alphabet of A tokens.

    Every quantity is a sum over all responses, so no recursion can hide a mistake that the tested code makes as well.
    """

    logits: Floats
    """[A, A]: row i holds the logits of the token after token i; row 0 those of the first token, too."""
    depth: int
    wins: frozenset[Path]
    """Responses that succeed."""

    @staticmethod
    def random(letters: int, depth: int, seed: int, scale: float = 1.0) -> ExactTree:
        """Return a tree with random logits in which every response succeeds with probability 1/2."""
        random = np.random.default_rng(seed)
        leaves = list(product(range(letters), repeat=depth))
        wins = frozenset(leaf for leaf in leaves if random.random() < 0.5)
        return ExactTree(scale * random.normal(size=(letters, letters)), depth, wins)

    def log_p(self, prefix: Path, nudges: Mapping[Path, Floats] | None = None) -> Floats:
        """Return log-probabilities of the token after a prefix, [A]. nudges: added to the logits of single prefixes."""
        z = self.logits[prefix[-1] if prefix else 0] + (nudges or {}).get(prefix, 0.0)
        result: Floats = z - np.log(np.exp(z).sum())
        return result

    def success(self, prefix: Path, nudges: Mapping[Path, Floats] | None = None) -> float:
        """Return the probability that a response succeeds, given that it begins with the prefix."""
        total = 0.0
        for leaf in self.wins:
            if leaf[: len(prefix)] == prefix:
                total += float(
                    np.exp(sum(self.log_p(leaf[:t], nudges)[leaf[t]] for t in range(len(prefix), self.depth)))
                )
        return total

    def reach(self, prefix: Path) -> float:
        """Return the probability that a response begins with the prefix."""
        return float(np.exp(sum(self.log_p(prefix[:t])[prefix[t]] for t in range(len(prefix)))))

    def success_after(self, prefix: Path) -> Floats:
        """Return the probability of success after the prefix and each token, [A]: Q of the paper."""
        return np.array([self.success((*prefix, token)) for token in range(len(self.logits))])

    def nodes(self) -> list[Path]:
        """Return all prefixes that a token follows."""
        return [prefix for t in range(self.depth) for prefix in product(range(len(self.logits)), repeat=t)]
