"""Writes into the paged cache touch exactly the slots and pages they name."""

from __future__ import annotations

import torch

from genssd.kernels.cache import copy_pages, write_kv


def test_write_puts_each_row_into_its_slot() -> None:
    k_pages, v_pages = torch.zeros(5, 4, 2, 3), torch.zeros(5, 4, 2, 3)
    k, v = torch.randn(6, 2, 3), torch.randn(6, 2, 3)
    slots = [19, 0, 7, 8, 3, 12]
    write_kv(k, v, k_pages, v_pages, torch.tensor(slots))
    for row, slot in enumerate(slots):
        assert torch.equal(k_pages[slot // 4, slot % 4], k[row])
        assert torch.equal(v_pages[slot // 4, slot % 4], v[row])
    assert int((k_pages != 0).flatten(2).any(-1).sum()) == 6
    assert int((v_pages != 0).flatten(2).any(-1).sum()) == 6


def test_copy_takes_whole_pages_of_all_layers() -> None:
    kv = torch.randn(3, 2, 6, 4, 2, 3)
    before = kv.clone()
    copy_pages(kv, torch.tensor([1, 5]), torch.tensor([4, 0]))
    assert torch.equal(kv[:, :, 4], before[:, :, 1])
    assert torch.equal(kv[:, :, 0], before[:, :, 5])
    for page in (1, 2, 3, 5):
        assert torch.equal(kv[:, :, page], before[:, :, page])
