"""Storage of the teacher's last hidden states along trajectories, in a binary file next to their rows.

FILE.bin    of each trajectory the states, [T, D] values, then a CRC-32 of them, uint32; all are little-endian

They are the states that predict the tokens, after the last norm and over the divisor of the logits, if the model has
one: what the teacher's head multiplies. So the head alone gives the teacher's whole distribution of every token
(2606.19348).

The field `teacher_states` of a row locates its own states (row_bytes.py): {"file": name, "offset": bytes, "bytes": B,
"tokens": T, "width": D, "dtype": "bfloat16" or "float32", "teacher": fingerprint}. T counts the tokens of the row's
lead (`lead_tokens`) as well.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genssd.distill.data.row_bytes import RowBytes, RowBytesFile, locate_bytes, read_numbers
from genssd.engine.common.amounts import format_bytes, format_count
from genssd.engine.common.errors import InputError

FIELD = "teacher_states"
"""Field of a row that locates its states."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Data types of stored states, by their names."""
CHECKSUM_BYTES = 4
LARGEST_WIDTH = 1 << 20


def encode_states(states_TD: Tensor) -> bytes:
    """Return the code of a trajectory's states, which are on the CPU, bfloat16 or float32."""
    values = states_TD.contiguous().view(torch.int16 if states_TD.dtype == torch.bfloat16 else torch.int32)
    code = values.numpy().astype(values.numpy().dtype.newbyteorder("<"), copy=False).tobytes()
    return code + zlib.crc32(code).to_bytes(CHECKSUM_BYTES, "little")


def decode_states(code: bytes, tokens: int, width: int, dtype: torch.dtype) -> Tensor | None:
    """Return the states, [tokens, width]; None where the bytes are not such a code, or a value is not finite."""
    content, checksum = code[:-CHECKSUM_BYTES], code[-CHECKSUM_BYTES:]
    if len(content) != tokens * width * dtype.itemsize or zlib.crc32(content).to_bytes(4, "little") != checksum:
        return None
    kind = "i2" if dtype == torch.bfloat16 else "i4"
    values = np.frombuffer(content, dtype=f"<{kind}").astype(f"={kind}")
    states_TD = torch.from_numpy(values).view(dtype).reshape(tokens, width)
    return states_TD if bool(torch.isfinite(states_TD).all()) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLocation:
    """Location of one trajectory's states in a file."""

    place: RowBytes
    tokens: int
    """Number of tokens that the states predict."""
    width: int
    """Number of values in a state."""
    dtype: str
    teacher: str
    """Fingerprint of the teacher's checkpoint."""

    def read(self) -> Tensor:
        """Return the states, [tokens, width]. Raises InputError when the file cannot be read or holds none there."""
        states_TD = decode_states(self.place.read(), self.tokens, self.width, DTYPES[self.dtype])
        if states_TD is None:
            raise self.place.make_damaged_error("hidden states")
        return states_TD

    def check_teacher(self, fingerprint: str) -> None:
        """Raise InputError where the states are not those of the teacher whose checkpoint has this fingerprint."""
        if self.teacher != fingerprint:
            raise InputError(
                f"{self.place.where}: teacher_states are of the teacher {self.teacher}, and the checkpoint that "
                f"teacher_model_name_or_path names is {fingerprint}: its head says nothing about them. Name the "
                "checkpoint that the rows were made with, or leave kd_states out"
            )


class StateStore:
    """An open file that states are appended to; a context manager."""

    def __init__(self, path: Path, end: int, *, teacher: str) -> None:
        """Open the file as `RowBytesFile` does. teacher: fingerprint of its checkpoint."""
        self._file = RowBytesFile(path, end)
        self._teacher = teacher
        self.num_tokens = 0
        """Number of tokens whose states were appended."""
        self.num_bytes = 0
        """Number of bytes that were appended."""

    def append(self, states_TD: Tensor) -> dict[str, Any]:
        """Write one trajectory's states, wait until they are on disk, and return the field of its row.

        Raises InputError when the file cannot be written.
        """
        tokens, width = states_TD.shape
        place = self._file.append(encode_states(states_TD))
        self.num_tokens += tokens
        self.num_bytes += place["bytes"]
        dtype = str(states_TD.dtype).removeprefix("torch.")
        return {**place, "tokens": tokens, "width": width, "dtype": dtype, "teacher": self._teacher}

    def describe(self) -> str:
        """Return one line that says how much was appended."""
        each = self.num_bytes // max(1, self.num_tokens)
        return (
            f"the teacher's hidden states of {format_count(self.num_tokens, 'token')}: {format_bytes(self.num_bytes)}, "
            f"{format_count(each, 'byte')} each"
        )

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def locate_states(field: object, directory: Path, tokens: int, where: str) -> StateLocation | None:
    """Return the location that a row's field `teacher_states` gives; None without the field.

    directory: of the row's file. tokens: number of tokens in the row's lead and completion. Raises InputError naming
    `where`.
    """
    if field is None:
        return None
    located, (_, num_bytes, count, width) = read_numbers(field, FIELD, ("tokens", "width"), where)
    dtype, teacher = located.get("dtype"), located.get("teacher")
    if dtype not in DTYPES or not isinstance(teacher, str):
        raise InputError(f"{where}: teacher_states must name a dtype of {', '.join(DTYPES)}, and the teacher")
    if count != tokens:
        raise InputError(f"{where}: teacher_states have {format_count(count, 'token')}, lead and completion {tokens}")
    if not 1 <= width <= LARGEST_WIDTH or num_bytes != count * width * DTYPES[dtype].itemsize + CHECKSUM_BYTES:
        raise InputError(
            f"{where}: teacher_states cannot hold {count} x {width} values of {dtype} in "
            f"{format_count(num_bytes, 'byte')}"
        )
    place = locate_bytes(located, directory, FIELD, where)
    return StateLocation(place=place, tokens=count, width=width, dtype=dtype, teacher=teacher)
