"""Microbenchmarks of the native CPU kernels against eager torch. Run: `make bench`.

The implementations of a group compute the same result, which is checked before they are timed; read the ratio of their
medians within one run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from genssd.kernels.attention import SEGMENT_TOKENS, build_segment_table, paged_attention
from genssd.kernels.linear import linear
from genssd.kernels.packed_keys import pack_keys
from genssd.kernels.sampling import gumbel_noise, gumbel_reference, keep_likely, sample


@pytest.mark.parametrize("product", [linear, torch.nn.functional.linear], ids=["native", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 16, 64, 512])
def test_linear(benchmark: BenchmarkFixture, product: Callable[..., Tensor], rows: int, dtype: torch.dtype) -> None:
    """Time a projection of a model of width 1024."""
    x, weight = torch.randn(rows, 1024).to(dtype), torch.randn(6144, 1024).to(dtype)
    exact = x.double() @ weight.double().T
    step = 2.0**-7 if dtype == torch.bfloat16 else 1e-4
    assert bool(((product(x, weight).double() - exact).abs() <= step * (exact.abs() + 1)).all())
    benchmark.group = f"linear 6144 x 1024, {rows} rows, {str(dtype)[6:]}"
    benchmark(product, x, weight)


def gather_and_attend(q_BHE: Tensor, k: Tensor, v: Tensor, tables: Tensor, length: int) -> Tensor:
    """Gather every branch's keys and values from the pages and call torch's attention on them, [B, H, E]."""
    k_BGTE, v_BGTE = (x[tables].flatten(1, 2)[:, :length].transpose(1, 2) for x in (k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q_BHE[:, :, None], k_BGTE, v_BGTE, enable_gqa=True)[:, :, 0]


@pytest.mark.parametrize("which", ["shared", "private", "eager"])
@pytest.mark.parametrize(("branches", "prefix"), [(1, 1024), (16, 1024), (64, 1024), (16, 8192)])
def test_decode_attention(benchmark: BenchmarkFixture, which: str, branches: int, prefix: int) -> None:
    """Time the attention of one decoding step of branches after a shared prefix.

    private: the native kernel on branches that share no page.
    """
    heads, kv_heads, width, page = 16, 8, 128, 16
    own = 1 if which != "private" else prefix // page + 1
    pages = prefix // page + 1 - own + branches * own
    q = torch.randn(branches, heads, width).bfloat16()
    k, v = torch.randn(2, pages, page, kv_heads, width).bfloat16()
    tables = np.tile(np.arange(prefix // page + 1, dtype=np.int32), (branches, 1))
    tables[:, -own:] += own * np.arange(branches, dtype=np.int32)[:, None]
    table = build_segment_table(
        torch.from_numpy(tables),
        torch.arange(branches, dtype=torch.int32),
        torch.full((branches,), prefix, dtype=torch.int32),
        torch.ones(branches, dtype=torch.int32),
        page_size=page,
        segment=SEGMENT_TOKENS["cpu"],
        unit_rows=32,
    )

    packed = pack_keys(k)

    def run_native() -> Tensor:
        return paged_attention(q, packed, v, table, scale=width**-0.5)

    def run_eager() -> Tensor:
        return gather_and_attend(q, k, v, torch.from_numpy(tables).long(), prefix + 1)

    torch.testing.assert_close(run_native(), run_eager(), atol=2e-2, rtol=2e-2)
    benchmark.group = f"decode attention, {branches} branches behind {prefix} tokens"
    benchmark(run_eager if which == "eager" else run_native)


@pytest.mark.parametrize("noise", [gumbel_noise, gumbel_reference], ids=["native", "eager"])
def test_gumbel_noise(benchmark: BenchmarkFixture, noise: Callable[[Tensor, int], Tensor]) -> None:
    """Time the noise for 64 rows of a small vocabulary."""
    keys = torch.arange(64)
    torch.testing.assert_close(noise(keys, 8192), gumbel_reference(keys, 8192), atol=1e-3, rtol=0)
    benchmark.group = "gumbel noise, 64 x 8192"
    benchmark(noise, keys, 8192)


@pytest.mark.parametrize("which", ["native", "eager"])
@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_sampling(benchmark: BenchmarkFixture, which: str, top_p: float) -> None:
    """Time sampling 16 rows of a large vocabulary; eager: the reference's sort, with native noise."""
    logits, keys = 3 * torch.randn(16, 151936), torch.arange(16)

    def run_eager() -> Tensor:
        kept = keep_likely(logits, 0, top_p, 0.0) if top_p < 1.0 else logits
        return (kept + gumbel_noise(keys, logits.shape[1])).argmax(1)

    def run_native() -> Tensor:
        return sample(logits, keys, top_p=top_p)

    assert torch.equal(run_native(), run_eager())
    benchmark.group = f"sampling 16 x 151936, top_p {top_p}"
    benchmark(run_eager if which == "eager" else run_native)
