"""Targeted rollouts of one question: candidate tokens at nodes of its rollouts, the student's ends, and who succeeds.

Candidates of a node are the student's most likely tokens, the token that stands there, and each teacher's most likely
tokens. The rollout itself is not counted among the completions behind its own token: which rollouts are looked at as
correct or incorrect depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from genssd.distill.diagnose.placement import affordable
from genssd.engine.engine import Engine
from genssd.engine.generation import Completion
from genssd.engine.nodes import Fork
from genssd.engine.sampling import Sampling
from genssd.engine.text import Prompt

Verify = Callable[[str, str | None], bool]
"""Whether a response gives an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A place in a rollout, and the tokens that are tried there, the one that stands there included."""

    rollout: int
    position: int
    candidates: tuple[int, ...]

    @property
    def has_choice(self) -> bool:
        """Whether more than one token is tried. With one the ideal gradient is 0, whatever comes behind it."""
        return len(self.candidates) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt, the student's rollouts, and where it lies. occurrence: how many equal prompts come before."""

    index: int
    label: str
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    occurrence: int
    answer: str | None
    rollouts: tuple[Completion, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one node, nothing where there was no choice: of every candidate the successes among the first half
    of its completions and among the second, and how many were cut off, which counts as failure."""

    node: Node
    successes: tuple[tuple[int, ...], tuple[int, ...]]
    truncated: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a question's targeted rollouts cost, in completions and in tokens that the student computed."""

    completions: int
    """Written; behind the end of sequence there is nothing to write."""
    truncated: int
    """Of them cut off at max_tokens."""
    sampled_tokens: int
    forced_tokens: int
    prefix_tokens: int
    """Prompt and rollouts, each once."""
    naive_prefix_tokens: int
    """What a fresh generation per forced token would compute of prompts, prefixes and forced tokens."""


def candidates_of(sampled: int, likeliest: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Distinct tokens: each reader's likeliest, the student's first, and the one that stands there."""
    return tuple(dict.fromkeys([token for ids in likeliest for token in ids] + [sampled]))


def within_budget(nodes: Sequence[Node], ends: frozenset[int], completions: int, budget: int) -> Sequence[Node]:
    """The first nodes whose completions the budget holds. Where there is no choice nothing is written."""
    costs = [completions * sum(token not in ends for token in node.candidates) * node.has_choice for node in nodes]
    return nodes[: affordable(costs, budget)]


def force_nodes(
    engine: Engine,
    question: Question,
    nodes: Sequence[Node],
    verify: Verify,
    *,
    completions: int,
    sampling: Sampling,
    max_tokens: int,
    seed: int,
    report: Callable[[int], None] = lambda completions: None,
) -> tuple[list[Outcome], Spent]:
    """Try every candidate of every node at which there is a choice. report: completions written so far."""
    usage = engine.usage
    prefix_before, forced_before = usage.prefill_tokens, usage.forced_tokens
    forks: list[list[Fork]] = [[] for _ in question.rollouts]
    for node in filter(lambda node: node.has_choice, nodes):
        forks[node.rollout] += [Fork(position=node.position, token=token) for token in node.candidates]
    found: dict[tuple[int, Fork], list[Completion]] = {}
    written = truncated = sampled_tokens = naive = 0
    for rollout, fork, ends in engine.iter_force(
        question.prompt,
        [rollout.token_ids for rollout in question.rollouts],
        forks,
        n=completions,
        sampling=sampling,
        max_tokens=max_tokens,
        seed=seed,
        occurrence=question.occurrence,
        label=question.label,
    ):
        found[rollout, fork] = ends
        if any(c.token_ids for c in ends):
            written += len(ends)
            truncated += sum(c.status == "length" for c in ends)
            sampled_tokens += sum(len(c.token_ids) for c in ends)
            naive += len(question.prompt_ids) + fork.position + 1
            report(written)
    # judged in the order of nodes; many completions read the same
    verdicts: dict[str, bool] = {}
    spent = Spent(
        completions=written,
        truncated=truncated,
        sampled_tokens=sampled_tokens,
        forced_tokens=usage.forced_tokens - forced_before,
        prefix_tokens=usage.prefill_tokens - prefix_before,
        naive_prefix_tokens=naive,
    )
    return [_outcome(question, node, found, verify, verdicts) for node in nodes], spent


def succeeds(completion: Completion, answer: str | None, verify: Verify, verdicts: dict[str, bool]) -> bool:
    """Whether a response ends by itself and is right; verdicts: those known already."""
    if completion.status != "finished":
        return False
    if completion.text not in verdicts:
        verdicts[completion.text] = verify(completion.text, answer)
    return verdicts[completion.text]


def _outcome(
    question: Question,
    node: Node,
    found: dict[tuple[int, Fork], list[Completion]],
    verify: Verify,
    verdicts: dict[str, bool],
) -> Outcome:
    halves: tuple[list[int], list[int]] = ([], [])
    cut = []
    for token in node.candidates if node.has_choice else ():
        ends = found[node.rollout, Fork(position=node.position, token=token)]
        right = [succeeds(c, question.answer, verify, verdicts) for c in ends]
        middle = len(ends) // 2
        halves[0].append(sum(right[:middle]))
        halves[1].append(sum(right[middle:]))
        cut.append(sum(c.status == "length" for c in ends))
    return Outcome(node=node, successes=(tuple(halves[0]), tuple(halves[1])), truncated=tuple(cut))
