"""A teacher of whom a training has the last hidden states, stored with the rows, and the head.

Both together give the teacher's whole distribution of every token, as the teacher in memory would, up to the rounding
of the states (data/state_store.py).

Shapes:  M completion tokens of all examples   D hidden size   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from genssd.distill.data.examples import Example
from genssd.distill.data.state_store import StateLocation
from genssd.distill.train.losses import Head
from genssd.engine.checkpoints.checkpoint import fingerprint
from genssd.engine.common.errors import InputError
from genssd.engine.setup.head_loading import load_head
from genssd.engine.setup.memory import choose_dtype
from genssd.kernels.weight import Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTeacher:
    """The head of a teacher, which multiplies its stored states."""

    weight_VD: Weight
    softcap: float | None

    @staticmethod
    def load(directory: Path, device: torch.device) -> StoredTeacher:
        """Load the head in the data type in which a teacher in memory would be. Raises CheckpointError."""
        head = load_head(directory, choose_dtype(directory, "auto", device), device)
        return StoredTeacher(weight_VD=head.weight, softcap=head.softcap)

    def read(self, examples: Sequence[Example]) -> Head:
        """Return the states of the examples' completion tokens, read from their files, with the head.

        Raises InputError where a file cannot be read or is damaged.
        """
        hidden_MD = torch.cat([require_states(example).read() for example in examples])
        weight_VD = self.weight_VD
        assert isinstance(weight_VD, torch.Tensor)
        return Head(hidden_MD.to(weight_VD.device, weight_VD.dtype), weight_VD, self.softcap)


def require_states(example: Example) -> StateLocation:
    """Return the location of an example's states. Raises InputError naming its row where it has none."""
    if example.states is None:
        raise InputError(
            f"{example.where}: no teacher_states of this student's tokenizer, which kd_states reads; make the rows "
            "with --teacher-states of select or generate, or leave kd_states out"
        )
    return example.states


def check_states(examples: Sequence[Example], teacher: Path) -> None:
    """Raise InputError naming the first example without states of the teacher in this directory."""
    expected = fingerprint(teacher)
    for example in examples:
        require_states(example).check_teacher(expected)
