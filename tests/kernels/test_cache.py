"""Writes into the paged cache touch exactly the slots and pages they name, with what they should hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genssd.kernels.cache import copy_pages, write_kv
from genssd.kernels.packed_keys import pack_keys, split_layer, unpack_keys

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
        "k_pages": torch.full((PAGES, PAGE, KV_HEADS, WIDTH), 7.0, dtype=dtype),
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
    k_slots, v_slots = given["k_pages"].flatten(0, 1), given["v_pages_PSGE"].flatten(0, 1)
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_keys_hold_the_numbers_of_the_rows(dtype: torch.dtype) -> None:
    """Number e of the key in a slot is in cell e // v, beside the same number of its neighbours in the page."""
    rows, packed = inputs(dtype), inputs(dtype)
    packed["k_pages"], packed["v_pages_PSGE"] = split_layer(
        torch.stack((torch.full_like(rows["k_pages"], 7.0), packed["v_pages_PSGE"]))
    )
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(write_kv(**packed), write_kv(**rows), **close)
    v = 2 if dtype == torch.bfloat16 else 1
    assert packed["k_pages"].shape == (PAGES, KV_HEADS, WIDTH // v, PAGE, v)
    for page in range(PAGES):
        for offset in range(PAGE):
            for e in range(WIDTH):
                number = packed["k_pages"][page, :, e // v, offset, e % v]
                torch.testing.assert_close(number, rows["k_pages"][page, offset, :, e], **close)
    assert torch.equal(packed["v_pages_PSGE"], rows["v_pages_PSGE"])
    assert torch.equal(packed["k_pages"] == 7, pack_keys(rows["k_pages"]) == 7), "other slots keep what they held"


def test_packing_keeps_every_number_and_fills_up_with_zeros() -> None:
    for dtype, width in ((torch.bfloat16, 7), (torch.bfloat16, 8), (torch.float32, 7), (torch.float16, 1)):
        keys = torch.randn(3, 4, 2, width, generator=torch.Generator().manual_seed(1)).to(dtype)
        packed = pack_keys(keys)
        assert torch.equal(unpack_keys(packed, width), keys)
        assert packed.count_nonzero() == keys.count_nonzero()


def test_pages_may_be_a_view() -> None:
    given, spread = inputs(), inputs()
    for name in ("k_pages", "v_pages_PSGE"):
        spread[name] = torch.full((PAGES, PAGE, 2 * KV_HEADS, WIDTH), 7.0).double()[:, :, ::2]
    assert torch.equal(write_kv(**given), write_kv(**spread))
    assert torch.equal(given["k_pages"], spread["k_pages"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, r"qkv must be \[N, 5 \+ 2 \* 2, 10\]"),
        ({"v_pages_PSGE": torch.zeros(PAGES, PAGE, KV_HEADS, WIDTH)}, "must agree"),
        ({"k_pages": torch.zeros(PAGES, KV_HEADS, PAGE, WIDTH, 1).double()}, "must agree"),
        ({"k_pages": torch.zeros(PAGES, KV_HEADS, WIDTH // 2, PAGE, 2).double()}, "must agree"),
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
