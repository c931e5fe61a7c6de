"""The store of the teacher's hidden states: what is read is what was written; damage is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genssd.distill.data.state_store import StateStore, decode_states, encode_states, locate_states
from genssd.engine.common.errors import InputError

TYPES = [torch.bfloat16, torch.float32]
STATES = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 33)])
def test_what_is_read_is_what_was_written(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    states = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    code = encode_states(states)
    assert len(code) == states.numel() * dtype.itemsize + 4
    read = decode_states(code, *shape, dtype)
    assert read is not None
    assert read.dtype == dtype
    assert torch.equal(read, states)
    assert torch.equal(encode_and_read(states.T.contiguous().T), states), "a view in another order"


def encode_and_read(states: torch.Tensor) -> torch.Tensor:
    read = decode_states(encode_states(states), states.shape[0], states.shape[1], states.dtype)
    assert read is not None
    return read


def test_every_damaged_byte_is_found() -> None:
    code = encode_states(STATES)
    for place in range(len(code)):
        damaged = bytearray(code)
        damaged[place] ^= 1 << place % 8
        assert decode_states(bytes(damaged), 3, 5, torch.float32) is None
        assert decode_states(code[:place], 3, 5, torch.float32) is None
    assert decode_states(code, 5, 3, torch.bfloat16) is None


def test_values_that_are_not_finite_are_no_states() -> None:
    assert decode_states(encode_states(STATES.log()), 3, 5, torch.float32) is None


def test_a_store_that_is_damaged_or_of_another_teacher_is_named(tmp_path: Path) -> None:
    with StateStore(tmp_path / "s.bin", 0, teacher="0123") as store:
        fields = [store.append(STATES), store.append(STATES.bfloat16())]
        assert store.describe() == "the teacher's hidden states of 6 tokens: 98 bytes, 16 bytes each"
    places = [locate_states(field, tmp_path, 3, "here") for field in fields]
    assert places[0] is not None
    assert places[1] is not None
    assert torch.equal(places[0].read(), STATES)
    assert torch.equal(places[1].read(), STATES.bfloat16())
    places[0].check_teacher("0123")
    with pytest.raises(InputError, match=r"^here: teacher_states are of the teacher 0123, .* names is 4567: its head"):
        places[0].check_teacher("4567")
    content = bytearray((tmp_path / "s.bin").read_bytes())
    content[70] ^= 8
    (tmp_path / "s.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"^here: .*s\.bin holds no hidden states at byte 64: it is damaged, or not"):
        places[1].read()
    with pytest.raises(InputError, match="shorter than its rows say"):
        StateStore(tmp_path / "s.bin", 99, teacher="0123")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "none.bin"}, "cannot be read"),
        ({"offset": 1 << 70}, "too few"),
        ({"width": 4}, "cannot hold 3 x 4 values of float32 in 64 bytes"),
        ({"width": 0}, "cannot hold"),
        ({"bytes": 20}, "cannot hold 3 x 5 values"),
        ({"dtype": "bfloat16"}, "cannot hold 3 x 5 values of bfloat16"),
        ({"dtype": "int8"}, "must name a dtype of bfloat16, float32, and the teacher"),
        ({"teacher": None}, "must name a dtype of bfloat16, float32, and the teacher"),
        ({"tokens": 2}, "teacher_states have 2 tokens, lead and completion 3"),
        ({"offset": -1}, "must name file, offset, bytes, tokens and width"),
    ],
)
def test_a_field_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with StateStore(tmp_path / "s.bin", 0, teacher="0123") as store:
        field = store.append(STATES)
    assert locate_states(None, tmp_path, 3, "here") is None
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        locate_states({**field, **change}, tmp_path, 3, "here")
