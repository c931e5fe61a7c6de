"""Microbenchmarks of the native CPU kernels against the eager torch they replace. Run: `make bench`.

Each pair computes the same thing, checked before it is timed; read the ratio of the medians within one run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from genssd.kernels.attention import AttentionPlan, paged_attention, paged_attention_reference
from genssd.kernels.sampling import gumbel_noise, gumbel_reference

Attention = Callable[..., Tensor]


@pytest.mark.parametrize("attend", [paged_attention, paged_attention_reference], ids=["native", "eager"])
@pytest.mark.parametrize(("branches", "prefix"), [(16, 256), (64, 1024)])
def test_decode_attention(benchmark: BenchmarkFixture, attend: Attention, branches: int, prefix: int) -> None:
    """One decoding step of branches that share all their pages."""
    heads, kv_heads, width, page = 8, 4, 64, 16
    pages = prefix // page
    q = torch.randn(branches, heads, width)
    k, v = torch.randn(2, pages, page, kv_heads, width)
    plan = AttentionPlan(
        page_table_BW=torch.arange(pages, dtype=torch.int32).repeat(branches, 1),
        row_sequence_N=torch.arange(branches, dtype=torch.int32),
        row_position_N=torch.full((branches,), prefix - 1, dtype=torch.int32),
    )
    expected = paged_attention_reference(q, k, v, plan, scale=width**-0.5)
    torch.testing.assert_close(attend(q, k, v, plan, scale=width**-0.5), expected, atol=1e-5, rtol=0)
    benchmark.group = f"decode attention, {branches} branches behind {prefix} tokens"
    benchmark(attend, q, k, v, plan, scale=width**-0.5)


@pytest.mark.parametrize("noise", [gumbel_noise, gumbel_reference], ids=["native", "eager"])
def test_gumbel_noise(benchmark: BenchmarkFixture, noise: Callable[[Tensor, int], Tensor]) -> None:
    """The noise of 64 rows of a small vocabulary."""
    keys = torch.arange(64)
    torch.testing.assert_close(noise(keys, 8192), gumbel_reference(keys, 8192), atol=1e-3, rtol=0)
    benchmark.group = "gumbel noise, 64 x 8192"
    benchmark(noise, keys, 8192)
