"""Targeted rollouts of one question: every candidate token is forced at its node, and the student completes it.

Candidates of a node are the student's most likely tokens, the rollout's own token, and each teacher's most likely
tokens. The rollout itself is not counted among the completions of its own token: whether its nodes are grouped as those
of a correct or an incorrect rollout depends on it, so the success rate would be biased.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from genssd.distill.answers.forms import Verdict
from genssd.distill.diagnose.placement import count_affordable
from genssd.engine.calls.generation import Completion
from genssd.engine.calls.nodes import Fork
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling
from genssd.engine.texts.text import Prompt

Verify = Callable[[str, str | None], Verdict]
"""Function that judges whether a response (first argument) gives a reference answer (second argument)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionNode:
    """A position in a rollout, together with the candidate tokens that are tried there."""

    rollout: int
    """Index of the rollout among those of its question."""
    position: int
    """Index of the token in the response, from 0, that the candidates replace."""
    candidates: tuple[int, ...]
    """Token ids, the rollout's own token included."""

    @property
    def has_choice(self) -> bool:
        """Whether more than one token is tried. With one token the ideal gradient is 0, whatever follows it."""
        return len(self.candidates) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReading:
    """A node within the budget, with the log-probabilities of its candidates."""

    node: DecisionNode
    logprob: Mapping[str, Sequence[float]]
    """Log-probability of every candidate over the whole vocabulary, by the reader's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt with its reference answer and the student's rollouts."""

    index: int
    """Index in the data, from 0."""
    label: str
    """File and line of the question, for messages."""
    prompt: Prompt
    prompt_ids: tuple[int, ...]
    occurrence: int
    """Number of equal prompts earlier in the data."""
    answer: str | None
    """Reference answer."""
    rollouts: tuple[Completion, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Success counts of one node's candidates; empty where the node has no choice."""

    node: DecisionNode
    successes: tuple[tuple[int, ...], tuple[int, ...]]
    """Number of successes of every candidate, among the first half of its completions and among the second."""
    truncated: tuple[int, ...]
    """Number of every candidate's completions that were cut off; these count as failures."""
    undecided: int
    """Number of completions that could not be judged; these count as failures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionCost:
    """Cost of one question's targeted rollouts, in completions and in tokens that the student computed."""

    completions: int
    """Completions that were written; after the end of sequence there is none."""
    truncated: int
    """Completions that were cut off at max_tokens."""
    sampled_tokens: int
    """Tokens in the completions."""
    forced_tokens: int
    """Candidate tokens that were forced and computed."""
    prefix_tokens: int
    """Tokens of the prompt and the rollouts, each computed once."""
    naive_prefix_tokens: int
    """Tokens of prompts, prefixes and forced tokens that one separate generation per forced token would compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOptions:
    """Options of the completions that the student writes after every forced token."""

    completions: int
    """Number of completions per candidate; even."""
    sampling: Sampling
    max_tokens: int
    """Maximum number of tokens in a response, from its beginning."""
    seed: int


def merge_candidates(sampled: int, likeliest: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return distinct tokens: each reader's most likely ones, the student's first, and last the rollout's own token.

    sampled: the rollout's own token. likeliest: [reader][token].
    """
    return tuple(dict.fromkeys([token for ids in likeliest for token in ids] + [sampled]))


def limit_to_budget(
    nodes: Sequence[DecisionNode], end_ids: frozenset[int], completions: int, budget: int
) -> Sequence[DecisionNode]:
    """Return the first nodes whose completions fit into the budget together; a node without a choice costs nothing.

    end_ids: tokens that end a response, after which no completion is written. completions: number per candidate.
    """
    costs = [completions * sum(token not in end_ids for token in node.candidates) * node.has_choice for node in nodes]
    return nodes[: count_affordable(costs, budget)]


def force_nodes(
    engine: Engine,
    question: Question,
    nodes: Sequence[DecisionNode],
    verify: Verify,
    options: CompletionOptions,
    report: Callable[[int], None] = lambda completions: None,
) -> tuple[list[Outcome], QuestionCost]:
    """Complete every candidate of every node that has a choice; return one Outcome per node, and the cost.

    report: called with the number of completions written so far.
    """
    usage = engine.usage
    prefix_before, forced_before = usage.prefill_tokens, usage.forced_tokens
    forks: list[list[Fork]] = [[] for _ in question.rollouts]
    for node in filter(lambda node: node.has_choice, nodes):
        forks[node.rollout] += [Fork(position=node.position, token=token) for token in node.candidates]
    completed: dict[tuple[int, Fork], list[Completion]] = {}
    written = truncated = sampled_tokens = naive_prefix_tokens = 0
    for rollout, fork, completions in engine.iter_force(
        question.prompt,
        [rollout.token_ids for rollout in question.rollouts],
        forks,
        n=options.completions,
        sampling=options.sampling,
        max_tokens=options.max_tokens,
        seed=options.seed,
        occurrence=question.occurrence,
        label=question.label,
    ):
        completed[rollout, fork] = completions
        if any(c.token_ids for c in completions):
            written += len(completions)
            truncated += sum(c.status == "length" for c in completions)
            sampled_tokens += sum(len(c.token_ids) for c in completions)
            naive_prefix_tokens += len(question.prompt_ids) + fork.position + 1
            report(written)
    # many completions have the same text, so each text is judged once
    verdicts: dict[str, Verdict] = {}
    cost = QuestionCost(
        completions=written,
        truncated=truncated,
        sampled_tokens=sampled_tokens,
        forced_tokens=usage.forced_tokens - forced_before,
        prefix_tokens=usage.prefill_tokens - prefix_before,
        naive_prefix_tokens=naive_prefix_tokens,
    )
    return [_count_successes(question, node, completed, verify, verdicts) for node in nodes], cost


def succeeds(completion: Completion, answer: str | None, verify: Verify, verdicts: dict[str, Verdict]) -> bool:
    """Return whether a response ends by itself and is correct. verdicts: by text, extended by new ones."""
    if completion.status != "finished":
        return False
    if completion.text not in verdicts:
        verdicts[completion.text] = verify(completion.text, answer)
    return verdicts[completion.text].is_correct


def _count_successes(
    question: Question,
    node: DecisionNode,
    completed: dict[tuple[int, Fork], list[Completion]],
    verify: Verify,
    verdicts: dict[str, Verdict],
) -> Outcome:
    halves: tuple[list[int], list[int]] = ([], [])
    truncated = []
    undecided = 0
    for token in node.candidates if node.has_choice else ():
        completions = completed[node.rollout, Fork(position=node.position, token=token)]
        succeeded = [succeeds(c, question.answer, verify, verdicts) for c in completions]
        middle = len(completions) // 2
        halves[0].append(sum(succeeded[:middle]))
        halves[1].append(sum(succeeded[middle:]))
        truncated.append(sum(c.status == "length" for c in completions))
        judged = [verdicts[c.text] for c in completions if c.status == "finished"]
        undecided += sum(verdict.undecided is not None for verdict in judged)
    successes = (tuple(halves[0]), tuple(halves[1]))
    return Outcome(node=node, successes=successes, truncated=tuple(truncated), undecided=undecided)
