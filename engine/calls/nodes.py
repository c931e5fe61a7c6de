"""Nodes of responses: what a model predicts there, and how it continues if another token is put there.

The node at position t of a response lies before its token t. Responses are read in one pass over prompt and response;
of all hidden states only those at the nodes are kept, and the head is applied to these alone.

    prompt ---- y_0 ---- y_1 y_2 y_3 ---- y_4 ...    the response is computed once, up to its last node
           \\         \\                \\
            a, b       a, c             b            forced tokens: each is computed once, on a fork of the path

Shapes:  N nodes   D model width   V vocabulary   K most likely tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from genssd.engine.cache.tree import Path
from genssd.engine.calls.generation import Completion, generate
from genssd.engine.calls.session import Session
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.common.options_check import check_count, check_types, check_value
from genssd.engine.common.usage import Usage
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.host.threads import computes
from genssd.engine.models.room import require_room
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.sampling import forced_stream
from genssd.engine.models.token_runs import nonfinite_logits
from genssd.engine.readers.prompt_ids import PromptIds
from genssd.engine.setup.requests import check_ids
from genssd.engine.setup.resources import Resources
from genssd.kernels.logprob import LOGITS_BYTES, top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class Fork:
    """A token that is put after the first `position` tokens of a response, in place of the token there."""

    position: int
    """Number of the response's tokens before the one that is put there."""
    token: int
    """Id of the token that is put there."""

    def __post_init__(self) -> None:
        check_types(self)


class NodeReader:
    """A reader of one model's predictions at nodes.

    vocabulary: number of ids that can be predicted; larger ids are padding.
    """

    def __init__(self, runner: ModelRunner, vocabulary: int, usage: Usage) -> None:
        self._runner = runner
        self._vocabulary = vocabulary
        self._usage = usage
        self.threads = runner.threads

    def states(
        self,
        prompt_ids: Sequence[int],
        responses: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        label: str,
    ) -> list[Tensor]:
        """Return the hidden states that predict each response's tokens at some positions, on the CPU, [N, D] each.

        The prompt is computed once, every response once up to its last node. label: name of the prompt in messages.
        Raises InputError on a position outside of its response and on ids outside of the vocabulary, CapacityError
        where the model's positions or the free pages do not suffice.
        """
        check_ids(prompt_ids, self._runner, label)
        for response, nodes in zip(responses, positions, strict=True):
            check_ids(response, self._runner, label)
            for position in nodes:
                if not 0 <= check_count(f"{label}: a position", position, least=0) <= len(response):
                    raise InputError(
                        f"{label}: position {position} lies outside of a response of "
                        f"{format_count(len(response), 'token')}"
                    )
        states: list[Tensor] = []
        with PrefixPath(self._runner, self._usage, label) as prompt:
            before_1D = prompt.extend(prompt_ids)[-1:]
            for response, nodes in zip(responses, positions, strict=True):
                with prompt.fork() as prefix:
                    states_ND = torch.cat((before_1D, prefix.extend(response[: max(nodes, default=0)])))
                states.append(states_ND[list(nodes)].cpu())
        return states

    @computes
    def likeliest(self, states_ND: Tensor, k: int, label: str, *, least: float = 0.0) -> list[list[int]]:
        """Return the ids of the k most likely tokens at every node that have at least the probability `least`.

        The most likely token comes first; of equal ones, the lower id.
        """
        k, least = check_count("k", k), check_value("least", least, float)
        likeliest: list[list[int]] = []
        for logits_NV in self._logits(states_ND, label):
            top_NK, ids_NK = top_k(logits_NV, min(k, self._vocabulary))
            counts_N = ((top_NK - logits_NV.logsumexp(1, keepdim=True)).exp() >= least).sum(1)
            likeliest += [ids[:count] for ids, count in zip(ids_NK.tolist(), counts_N.tolist(), strict=True)]
        return likeliest

    @computes
    def logprob(self, states_ND: Tensor, ids: Sequence[Sequence[int]], label: str) -> list[list[float]]:
        """Return the log-probabilities of given tokens at every node, at temperature 1, normalised in float64.

        ids: the tokens of each node. The probabilities of the whole vocabulary add up to 1. Raises InputError on a
        token that cannot be predicted.
        """
        for tokens in ids:
            for token in check_ids(tokens, self._runner, label):
                if token >= self._vocabulary:
                    raise InputError(f"{label}: token id {token} is padding: the model has {self._vocabulary} tokens")
        rows = (row for logits_NV in self._logits(states_ND, label) for row in logits_NV.double())
        return [(row[list(tokens)] - row.logsumexp(0)).tolist() for row, tokens in zip(rows, ids, strict=True)]

    def _logits(self, states_ND: Tensor, label: str) -> Iterator[Tensor]:
        """Yield the logits of a few nodes at a time, float32 [N, V]."""
        for part_ND in torch.split(states_ND, max(1, LOGITS_BYTES // (4 * self._vocabulary))):
            logits_NV = self._runner.logits(part_ND.to(self._runner.decoder.device))[:, : self._vocabulary]
            # a banned token has -inf; NaN and +inf are no logits, and at least one token must be possible
            if not bool((logits_NV.amax(1).isfinite() & ~logits_NV.isnan().any(1)).all()):
                raise nonfinite_logits(self._runner, label)
            yield logits_NV


class PrefixPath:
    """A path that is extended step by step and forked on the way.

    A context manager: its own path is dropped at the end, its forks stay.
    """

    def __init__(self, runner: ModelRunner, usage: Usage, label: str, path: Path | None = None) -> None:
        self._runner = runner
        self._usage = usage
        self._label = label
        self._path = runner.tree.root() if path is None else path
        self.threads = runner.threads

    @computes
    def extend(self, ids: Sequence[int]) -> Tensor:
        """Compute further tokens and return their hidden states, [len(ids), D].

        Raises CapacityError where the model's positions or the free pages do not suffice.
        """
        tree, config = self._runner.tree, self._runner.decoder.config
        if self._path.length + len(ids) > config.max_position_embeddings:
            raise CapacityError(
                f"{self._label}: prompt and response have more tokens than the {config.max_position_embeddings} "
                f"positions of the {self._runner.role} {self._runner.directory}"
            )
        num_pages = tree.pages_to_append(self._path, len(ids))
        require_room(self._runner, num_pages, f"{self._label}: prompt and response need", noun="more page")
        self._usage.prefill_tokens += len(ids)
        if not ids:
            decoder = self._runner.decoder
            return torch.empty(0, decoder.head.weight.shape[1], dtype=decoder.dtype, device=decoder.device)
        return self._runner.extend([self._path], [ids])[0]

    def fork(self) -> PrefixPath:
        """Return a second PrefixPath with the same tokens."""
        return PrefixPath(self._runner, self._usage, self._label, self.fork_path())

    def fork_path(self) -> Path:
        """Return a path with the same tokens, which the caller drops."""
        return self._runner.tree.fork(self._path)

    def __enter__(self) -> PrefixPath:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.tree.drop(self._path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forcing:
    """A request: `n` completions after every fork of some responses to one prompt."""

    prompt: PromptIds
    prompt_ids: tuple[int, ...]
    """Token ids of the prompt as the writing model reads it."""
    responses: Sequence[Sequence[int]]
    forks: Sequence[Sequence[Fork]]
    """Forks of each response."""
    stream: int
    """Random stream of the prompt; every fork has one of its own."""
    n: int
    max_tokens: int
    """Maximum number of tokens in a response: those before the forced token, the token itself, and those after it."""
    end_token_ids: frozenset[int]
    """Tokens that end a response."""
    label: str
    """Name of the prompt in messages."""


def iter_force(
    request: Forcing, session: Session, resources: Resources, model: Role
) -> Iterator[tuple[int, Fork, list[Completion]]]:
    """Check a request at once; yield the response's index, the fork and its n completions, as soon as they end.

    A completion's tokens are those after the forced one; its text is that of the whole response. After a token that
    ends a response all n are empty. The prompt is computed once, every response once up to its last fork; as many
    responses at a time as half of the free pages hold. Closing the iterator early frees all pages. Raises InputError on
    a fork outside its response, CapacityError when a response does not fit.
    """
    runner = resources.runner(model)
    if len(request.responses) != len(request.forks):
        raise InputError(f"{format_count(len(request.responses), 'response')} but forks of {len(request.forks)}")
    for response, forks in zip(request.responses, request.forks, strict=True):
        check_ids([*response, *(fork.token for fork in forks)], runner, request.label)
        last = min(len(response), request.max_tokens - 1)
        if not all(0 <= fork.position <= last for fork in forks):
            raise InputError(
                f"{request.label}: a fork lies outside its response of {format_count(len(response), 'token')} or "
                "max_tokens"
            )
    limit = resources.response_limit(request.prompt, request.max_tokens, [model])
    return _force(replace(request, max_tokens=limit), session, runner, resources.usage)


def _force(
    request: Forcing, session: Session, runner: ModelRunner, usage: Usage
) -> Iterator[tuple[int, Fork, list[Completion]]]:
    with PrefixPath(runner, usage, request.label) as prompt:
        prompt.extend(request.prompt_ids)
        for group in _groups(request, runner):
            to_write: list[tuple[int, Fork]] = []
            for index in group:
                for fork in dict.fromkeys(request.forks[index]):
                    completions = _ended_completions(request, index, fork, session)
                    if completions is None:
                        to_write.append((index, fork))
                    else:
                        yield index, fork, completions
            queue = _open(request, to_write, prompt, session, runner)
            usage.forced_tokens += len(queue)
            for generation in generate(dict(enumerate(queue)), session.expander):
                yield *to_write[generation.index], generation.completions


def _ended_completions(request: Forcing, index: int, fork: Fork, session: Session) -> list[Completion] | None:
    """Return the completions of a fork after which nothing can be written, else None."""
    ids = [*request.responses[index][: fork.position], fork.token]
    if fork.token not in request.end_token_ids and len(ids) < request.max_tokens:
        return None
    status: Literal["finished", "length"] = "finished" if fork.token in request.end_token_ids else "length"
    return [Completion(token_ids=(), text=session.decode(ids), status=status, logprob=())] * request.n


def _groups(request: Forcing, runner: ModelRunner) -> Iterator[list[int]]:
    """Yield the indices of the responses, as many at a time as half of the free pages hold."""
    pool, group, num_held = runner.tree.pool, list[int](), 0
    for index, forks in enumerate(request.forks):
        # one page more: a half-filled page of the prompt is copied on the first write
        num_pages = max((fork.position for fork in forks), default=0) // pool.page_size + 2
        if group and num_held + num_pages > runner.tree.num_free // 2:
            yield group
            group, num_held = [], 0
        group.append(index)
        num_held += num_pages
    if group:
        yield group


def _open(
    request: Forcing,
    to_write: Sequence[tuple[int, Fork]],
    prompt: PrefixPath,
    session: Session,
    runner: ModelRunner,
) -> list[Expansion]:
    """Return an expansion for every fork, on pages shared up to the forced token; all or none."""
    opened: dict[tuple[int, Fork], Branch] = {}
    try:
        for index in dict.fromkeys(index for index, _ in to_write):
            response = request.responses[index]
            with prompt.fork() as prefix:
                num_computed = 0
                for fork in sorted((f for i, f in to_write if i == index), key=lambda fork: fork.position):
                    prefix.extend(response[num_computed : fork.position])
                    num_computed = fork.position
                    opened[index, fork] = Branch.from_prefix(
                        session,
                        request.prompt,
                        forced_stream(request.stream, index, fork.position, fork.token),
                        role=runner.role,
                        path=prefix.fork_path(),
                        history=[*response[:num_computed], fork.token],
                    )
    except BaseException:
        for branch in opened.values():
            branch.drop()
        raise
    chunk = Chunk(tokens=request.max_tokens, until=None)
    return [
        Expansion(branch, request.n, chunk, request.max_tokens - branch.length, request.label)
        for branch in (opened[key] for key in to_write)
    ]
