"""Activations of a prompt and its response: means of what the last layer's up projection gives for their tokens.

Shapes:  N tokens   F feed-forward width
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.candidate import ActivationMeans
from genssd.engine.host.threads import computes
from genssd.engine.models.room import require_room
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.token_runs import TokenRun, run_statistics


@computes
def mean_activations(
    runner: ModelRunner, prompt_ids: Sequence[int], ids: Sequence[int], start: int, special_ids: Collection[int]
) -> ActivationMeans:
    """Return the means over a prompt and over ids[start:], read after the prompt and ids[:start].

    special_ids: tokens that count for nothing. Raises CapacityError when the sequence does not fit into the free pages,
    InputError on a model whose last layer has no up projection, NumericsError on NaN or infinite logits.
    """
    path = runner.tree.root()
    num_read = max((i + 1 for i, token in enumerate(ids) if token not in special_ids), default=0)
    sequence = [*prompt_ids, *ids[:num_read]]  # the end of sequence may have no position left
    positions = runner.decoder.config.max_position_embeddings
    if len(sequence) > positions:
        raise InputError(
            f"the criterion reads {format_count(len(sequence), 'token')} at once; the {runner.role} has {positions} "
            "positions"
        )
    counts_N = torch.tensor([token not in special_ids for token in sequence])
    is_prompt_N = torch.arange(len(sequence)) < len(prompt_ids)
    is_response_N = torch.arange(len(sequence)) >= len(prompt_ids) + start
    totals = [torch.zeros(0, dtype=torch.float64)] * 2
    states = []
    try:
        num_pages = runner.tree.pages_to_append(path, len(sequence))
        require_room(runner, num_pages, f"prompt and response of {format_count(len(sequence), 'token')} need")
        first = 0
        for states_ND, activations_NF in runner.extend_observed(path, sequence):
            units_NF = torch.nn.functional.normalize(activations_NF.float(), dim=1).double().cpu()
            here = slice(first, first + len(units_NF))
            for k, part_N in enumerate((is_prompt_N, is_response_N)):
                total = (units_NF * (part_N & counts_N)[here, None]).sum(0)
                totals[k] = total if not len(totals[k]) else totals[k] + total
            states.append(states_ND[: max(0, len(prompt_ids) - first)])
            first += len(units_NF)
        nll_N = _prompt_nll(runner, prompt_ids, torch.cat(states))
    finally:
        runner.tree.drop(path)
    counted_N = counts_N[: len(prompt_ids)][1:]
    return ActivationMeans(
        prompt_F=totals[0] / max(1, int((is_prompt_N & counts_N).sum())),
        response_F=totals[1] / max(1, int((is_response_N & counts_N).sum())),
        prompt_nll=float(nll_N[counted_N].mean()) if bool(counted_N.any()) else 0.0,
        counted=tuple(token not in special_ids for token in ids[start:]),
    )


def _prompt_nll(runner: ModelRunner, prompt_ids: Sequence[int], states_ND: Tensor) -> Tensor:
    """Return the negative log-probabilities of a prompt's tokens after the first, float64 [N - 1]."""
    if len(prompt_ids) < 2:
        return torch.zeros(0, dtype=torch.float64)
    run = TokenRun(tokens=prompt_ids[1:], before_D=None, states_ND=states_ND[: len(prompt_ids) - 1])
    (stats,) = run_statistics(runner, [run], lambda index, offset: f"the prompt, position {offset + 1}")
    return -stats.logprob.double()
