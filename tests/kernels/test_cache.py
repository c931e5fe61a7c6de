"""Writes into the paged cache touch exactly the slots and pages they name, with what they should hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genssd.kernels.cache import copy_pages, write_kv

HEADS, KV_HEADS, WIDTH, PAGES, PAGE = 6, 2, 10, 5, 4
SLOTS = [19, 0, -1, 7, 8, 3, -1, 12]


def inputs(dtype: torch.dtype = torch.float64, rotated: int = WIDTH) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    rows = len(SLOTS)
    angle = torch.randn(rows, rotated // 2, generator=generator)
    return {
        "qkv_NKE": torch.randn(rows, HEADS + 2 * KV_HEADS, WIDTH, generator=generator).to(dtype),
        "cos": 1.5 * angle.cos(),
        "sin": 1.5 * angle.sin(),
        "k_pages_PSGE": torch.full((PAGES, PAGE, KV_HEADS, WIDTH), 7.0, dtype=dtype),
        "v_pages_PSGE": torch.full((PAGES, PAGE, KV_HEADS, WIDTH), 7.0, dtype=dtype),
        "slot_N": torch.tensor(SLOTS),
        "heads": HEADS,
    }


def expected_head(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None) -> Tensor:
    """One head of one row, as complex numbers and those that do not turn."""
    if norm is not None:
        x = norm * x / (x.square().mean() + 1e-6).sqrt()
    first, rest = x.double().split([2 * len(cos), len(x) - 2 * len(cos)])
    turned = torch.complex(*first.chunk(2)) * torch.complex(cos.double(), sin.double())
    return torch.cat((turned.real, turned.imag, rest))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [WIDTH, 6])
def test_rows_are_normed_rotated_and_put_into_their_slots(normed: bool, rotated: int) -> None:
    given = inputs(rotated=rotated)
    norms = [torch.linspace(-1, 2, WIDTH).double(), torch.linspace(2, 1, WIDTH).double()] if normed else [None, None]
    q = write_kv(**given, q_norm=norms[0], k_norm=norms[1])
    assert q.is_contiguous()
    untouched = torch.ones(PAGES * PAGE, dtype=torch.bool)
    k_slots, v_slots = given["k_pages_PSGE"].flatten(0, 1), given["v_pages_PSGE"].flatten(0, 1)
    for row, slot in enumerate(SLOTS):
        of_row, cos, sin = given["qkv_NKE"][row], given["cos"][row], given["sin"][row]
        for head in range(HEADS):
            torch.testing.assert_close(q[row, head], expected_head(of_row[head], cos, sin, norms[0]))
        if slot < 0:
            continue
        untouched[slot] = False
        for head in range(KV_HEADS):
            torch.testing.assert_close(k_slots[slot, head], expected_head(of_row[HEADS + head], cos, sin, norms[1]))
            assert torch.equal(v_slots[slot, head], of_row[HEADS + KV_HEADS + head])
    assert bool((k_slots[untouched] == 7).all())
    assert bool((v_slots[untouched] == 7).all())


def test_pages_may_be_a_view() -> None:
    given, spread = inputs(), inputs()
    for name in ("k_pages_PSGE", "v_pages_PSGE"):
        spread[name] = torch.full((PAGES, PAGE, 2 * KV_HEADS, WIDTH), 7.0).double()[:, :, ::2]
    assert torch.equal(write_kv(**given), write_kv(**spread))
    assert torch.equal(given["k_pages_PSGE"], spread["k_pages_PSGE"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, r"qkv must be \[N, 5 \+ 2 \* 2, 10\]"),
        ({"v_pages_PSGE": torch.zeros(PAGES, PAGE, KV_HEADS, WIDTH)}, "must agree"),
        ({"cos": torch.zeros(8, WIDTH)}, r"cos and sin must be float32 \[8, up to 5\], not \[8, 10\] and \[8, 5\]"),
        ({"cos": torch.zeros(8, 0), "sin": torch.zeros(8, 0)}, "cos and sin must be float32"),
        ({"sin": torch.zeros(8, WIDTH // 2).double()}, "cos and sin must be float32"),
        ({"slot_N": torch.zeros(8, dtype=torch.int32)}, r"slot must be int64 \[8\]"),
        ({"q_norm": torch.ones(WIDTH).double()}, "given together"),
        (
            {"q_norm": torch.ones(WIDTH).double(), "k_norm": torch.ones(4).double()},
            r"k_norm must be torch.float64 \[10",
        ),
    ],
)
def test_what_it_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_kv(**{**inputs(), **change})


def test_copy_copies_all_of_a_page_in_all_layers() -> None:
    kv = torch.randn(3, 2, 6, 4, 2, 3)
    before = kv.clone()
    copy_pages(kv, torch.tensor([1, 5]), torch.tensor([4, 0]))
    assert torch.equal(kv[:, :, 4], before[:, :, 1])
    assert torch.equal(kv[:, :, 0], before[:, :, 5])
    for page in (1, 2, 3, 5):
        assert torch.equal(kv[:, :, page], before[:, :, page])
