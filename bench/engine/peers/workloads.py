"""Workloads of the engine benchmarks, as token ids. Standard library only, because every interpreter runs this file.

    prefill         read one prompt of `prefix` ids that is in no cache, and draw its next token
    decode          `branches` continuations of one prefix that is in the cache, each of which has its first token:
                    `decoded` further tokens each, drawn at temperature 1
    score           the log-probability of every token of `candidates` responses of `scored` ids, after one prefix that
                    is in the cache
    select_expand   `prompts` prompts; a teacher draws `per_prompt` chunks of `chunk` tokens for each, a student scores
                    them, the one with the best mean log-probability is kept, until `response` tokens are kept. Teacher
                    and student have the same weights and caches of their own

Every round uses other ids, so that no round can reuse the cache of an earlier one.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

WORKLOADS = ("prefill", "decode", "score", "select_expand")
FIRST_ID = 256  # ids below are the tokenizer's bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Shape of a Qwen3-class decoder with an untied head."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of the model and of the workloads, named as in the descriptions of the workloads in workloads.py."""

    model: ModelShape
    prefix: int
    branches: int
    decoded: int
    candidates: int
    scored: int
    prompts: int
    prompt: int
    """Number of ids of each prompt of select_expand."""
    per_prompt: int
    """Number of candidates per prompt and round of select_expand."""
    chunk: int
    response: int

    @property
    def positions(self) -> int:
        """Length of the longest sequence, with a margin."""
        return max(self.prefix + max(self.decoded, self.scored), self.prompt + self.response) + 64


SIZES = {
    "full": Sizes(
        model=ModelShape(
            layers=6, width=1024, inner=3072, heads=16, kv_heads=8, head_dim=128, vocabulary=151936
        ),
        prefix=1024, branches=16, decoded=64, candidates=16, scored=64,
        prompts=4, prompt=128, per_prompt=8, chunk=64, response=256,
    ),
    "small": Sizes(
        model=ModelShape(layers=2, width=64, inner=128, heads=4, kv_heads=2, head_dim=32, vocabulary=1024),
        prefix=64, branches=4, decoded=8, candidates=4, scored=8,
        prompts=2, prompt=16, per_prompt=2, chunk=8, response=16,
    ),
}  # fmt: skip


def prefix_ids(sizes: Sizes, workload: str, round_: int) -> list[int]:
    """Return the prompt of `prefill`, or the shared prefix of `decode` and `score`."""
    return _ids(sizes, f"{workload} prefix {round_}", sizes.prefix)


def first_ids(sizes: Sizes, round_: int) -> list[int]:
    """Return the first token of each branch of `decode`, for engines that do not draw it themselves."""
    return _ids(sizes, f"decode first {round_}", sizes.branches)


def candidate_ids(sizes: Sizes, round_: int) -> list[list[int]]:
    """Return the responses that `score` scores."""
    return [_ids(sizes, f"score candidate {i} {round_}", sizes.scored) for i in range(sizes.candidates)]


def prompt_ids(sizes: Sizes, round_: int) -> list[list[int]]:
    """Return the prompts of `select_expand`."""
    return [_ids(sizes, f"select_expand prompt {i} {round_}", sizes.prompt) for i in range(sizes.prompts)]


def count_tokens(sizes: Sizes, workload: str) -> int:
    """Return the tokens of a workload, for its rate: read, decoded or scored ones; drawn ones for select_expand."""
    return {
        "prefill": sizes.prefix,
        "decode": sizes.branches * sizes.decoded,
        "score": sizes.candidates * sizes.scored,
        "select_expand": sizes.prompts * sizes.per_prompt * sizes.response,
    }[workload]


def _ids(sizes: Sizes, label: str, count: int) -> list[int]:
    random = Random(label)
    return [random.randrange(FIRST_ID + 1, sizes.model.vocabulary) for _ in range(count)]
