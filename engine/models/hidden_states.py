"""The hidden states of a model that predict the tokens of a given response: what its head multiplies.

Shapes:  T tokens of the response   D model width
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genssd.engine.common.amounts import format_count
from genssd.engine.host.threads import computes
from genssd.engine.models.room import require_room
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.token_runs import nonfinite_logits


@computes
def read_states(runner: ModelRunner, prompt_ids: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Return the hidden states that predict the tokens `ids` after a prompt, [T, D], in the model's dtype.

    They are those after the last norm, over the divisor of the logits, if the model has one. Raises CapacityError when
    the sequence does not fit into the free pages, NumericsError on NaN or infinite values.
    """
    path = runner.tree.root()
    sequence = [*prompt_ids, *ids[:-1]]  # the last token is predicted, not read
    try:
        num_pages = runner.tree.pages_to_append(path, len(sequence))
        require_room(runner, num_pages, f"prompt and response of {format_count(len(sequence), 'token')} need")
        (states_TD,) = runner.extend([path], [sequence], last=[len(ids)])
        if not bool(torch.isfinite(states_TD).all()):
            raise nonfinite_logits(runner, "a response")
        return states_TD.clone()
    finally:
        runner.tree.drop(path)
