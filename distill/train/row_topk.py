"""The teacher's most likely tokens of examples whose rows have them, as targets of a training step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from genssd.distill.data.examples import Example
from genssd.kernels.logprob import TopK


def read_topk(examples: Sequence[Example]) -> TopK:
    """Read and concatenate the teacher's top k of all examples; rows with a smaller k are padded with id -1.

    The tokens of a lead, which the teacher did not write, have rows of -1, which count as nothing.
    """
    parts = [_pad_lead(example.topk.read(), example.num_lead) for example in examples if example.topk is not None]
    most = max(part.ids.shape[1] for part in parts)
    padded = [
        TopK(
            torch.nn.functional.pad(part.ids, (0, most - part.ids.shape[1]), value=-1),
            torch.nn.functional.pad(part.logprob, (0, most - part.logprob.shape[1]), value=-math.inf),
        )
        for part in parts
    ]
    return TopK.concatenate(padded)


def _pad_lead(top: TopK, num_lead: int) -> TopK:
    """Return a top k with unused rows before it."""
    return TopK(
        torch.nn.functional.pad(top.ids, (0, 0, num_lead, 0), value=-1),
        torch.nn.functional.pad(top.logprob, (0, 0, num_lead, 0), value=-math.inf),
    )
