"""The native kernels on every instruction set: random shapes against float64, and bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genssd import _core
from genssd.kernels.activation import clamped_swiglu, clamped_swiglu_reference, geglu, swiglu
from genssd.kernels.cache import write_kv, write_kv_reference
from genssd.kernels.linear import linear
from genssd.kernels.logprob import NonFiniteLogits, linear_logprob
from genssd.kernels.norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from genssd.kernels.packed_keys import split_layer, unpack_keys
from genssd.kernels.sampling import gumbel_noise, keep_likely, linear_sample, sample
from genssd.kernels.weight import PackedWeight, pack_weight, select_rows

SETS = _core.instruction_sets()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

each_dtype = pytest.mark.parametrize(
    ("instructions", "dtype"),
    # tiles are for bfloat16 alone; the rest of amx_model is that of the sets with AVX-512
    [(name, dtype) for name in SETS for dtype in DTYPES if name != "amx_model" or dtype == torch.bfloat16],
    indirect=["instructions"],
    ids=str,
)

pytestmark = pytest.mark.skipif(not SETS, reason="there is no native kernel for this processor")


@pytest.fixture(params=SETS, autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    _core.use_instruction_set(request.param)
    yield request.param
    _core.use_instruction_set(SETS[0])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_product(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """float32 sums of exact products, rounded once to the dtype of out."""
    exact = x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    budget = 2.0**-24 * (2 + math.ceil(x.shape[1] / 8)) * size + ROUNDING[out.dtype] * exact.abs()
    if x.dtype == torch.bfloat16:  # vdpbf16ps takes subnormals for zeros
        budget = budget + 1e-30
    assert bool(((out.double() - exact).abs() <= budget + 1e-30).all())


@settings(max_examples=40)
@given(
    rows=st.integers(0, 120),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    wide=st.booleans(),
    offset=st.integers(0, 3),
)
def test_linear_of_any_shape(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, biased: bool, wide: bool, offset: int
) -> None:
    """Odd widths, widths that no vector divides, rows further apart than they are long, unaligned starts."""
    x = randn(rows, inputs + 5, seed=1, dtype=dtype)[:, offset : offset + inputs]
    w = randn(outputs, inputs + 3, seed=2, dtype=dtype)[:, offset : offset + inputs]
    bias = randn(outputs, seed=3, dtype=dtype) if biased else None
    out = torch.full((rows, outputs), torch.nan) if wide else None
    assert_product(linear(x, w, bias, out=out), x, w, bias)


@each_dtype
@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 130), (2048, 70), (3072, 65), (8, 300)])
def test_a_row_has_the_same_bits_in_any_batch_on_any_threads(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    x, w = randn(131, inputs, seed=4, dtype=dtype), randn(outputs, inputs, seed=5, dtype=dtype)
    torch.set_num_threads(1)
    whole = linear(x, w)
    assert_product(whole, x, w)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for rows in (1, 2, 5, 6, 7, 64, 131):
            assert torch.equal(linear(x[:rows], w), whole[:rows])
            assert torch.equal(linear(x[131 - rows :], w), whole[131 - rows :])


@settings(max_examples=30)
@given(
    rows=st.sampled_from([0, 1, 2, 5, 6, 7, 13, 255, 256, 257, 300]),
    inputs=st.integers(1, 80) | st.sampled_from([1023, 1024, 1025, 2051]),
    outputs=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
)
def test_packed_weights_give_the_same_bits(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, threads: int
) -> None:
    """Packed and unpacked weights give the same bits on every path, for any shape and any number of blocks of rows."""
    torch.set_num_threads(threads)
    x, w, bias = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(rows, inputs), (outputs, inputs), (outputs,)]))
    packed = pack_weight(w)
    assert isinstance(packed, PackedWeight)
    assert packed.shape == w.shape
    assert torch.equal(linear(x, packed, bias), linear(x, w, bias))
    strided = torch.stack((x, x), -1)[..., 0]
    assert torch.equal(linear(strided, packed), linear(x, w))
    index = torch.arange(rows) * 7 % outputs
    assert torch.equal(select_rows(packed, index), w[index])
    topk = min(2, outputs)
    whole = linear_logprob(x, w, index, bias=bias, topk=topk)
    stats = linear_logprob(strided, packed, index, bias=bias, topk=topk)
    for name in ("logprob", "logsumexp", "entropy", "sum_p2", "rank"):
        assert torch.equal(getattr(stats, name), getattr(whole, name))
    assert stats.topk is not None
    assert whole.topk is not None
    assert torch.equal(stats.topk.ids, whole.topk.ids)
    drawn, again = linear_sample(x, w, index, temperature=0.8), linear_sample(strided, packed, index, temperature=0.8)
    assert torch.equal(again.tokens, drawn.tokens)
    assert torch.equal(again.logprob, drawn.logprob)


def test_a_packed_weight_takes_rows_of_its_dtype_and_no_gradient() -> None:
    weight, index = pack_weight(randn(5, 8)), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="one dtype"):
        linear_logprob(randn(3, 8, dtype=torch.bfloat16), weight, index)
    with pytest.raises(ValueError, match="one dtype"):
        linear(randn(3, 8, dtype=torch.bfloat16), weight)
    with pytest.raises(ValueError, match="not differentiated"):
        linear_logprob(randn(3, 8).requires_grad_(), weight, index)
    with pytest.raises(ValueError, match="must be"):
        linear_logprob(randn(3, 7), weight, index)


@each_dtype
@pytest.mark.parametrize("vocabulary", [1, 7, 64, 65, 2048, 2049, 5000])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 3.0}])
def test_scores_equal_float64(vocabulary: int, dtype: torch.dtype, options: dict[str, float]) -> None:
    hidden, weight = randn(9, 37, seed=1, dtype=dtype), randn(vocabulary, 37, seed=2, dtype=dtype) / 4
    bias, target = randn(vocabulary, seed=3, dtype=dtype), torch.arange(9) * 577 % vocabulary
    target[0] = vocabulary - 1
    topk = min(5, vocabulary)
    stats = linear_logprob(hidden, weight, target, bias=bias, topk=topk, **options)
    z = hidden.double() @ weight.double().T + bias.double()
    if options:
        z = 3.0 * torch.tanh(z / 3.0) / 0.7
    p, log_p = z.softmax(1), z.log_softmax(1)
    close: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}
    torch.testing.assert_close(stats.logprob.double(), log_p.gather(1, target[:, None])[:, 0], **close)
    torch.testing.assert_close(stats.logsumexp.double(), z.logsumexp(1), **close)
    torch.testing.assert_close(stats.entropy.double(), -(p * log_p).sum(1), **close)
    torch.testing.assert_close(stats.sum_p2.double(), p.square().sum(1), **close)
    chosen = z.gather(1, target[:, None])
    assert bool((stats.rank <= 1 + (z > chosen - 1e-5).sum(1)).all())
    assert bool((stats.rank >= 1 + (z > chosen + 1e-5).sum(1)).all())
    assert stats.topk is not None
    torch.testing.assert_close(stats.topk.logprob.double(), log_p.topk(topk).values, **close)
    torch.testing.assert_close(log_p.gather(1, stats.topk.ids), stats.topk.logprob.double(), **close)


@each_dtype
def test_a_score_has_the_same_bits_in_any_batch_on_any_threads(dtype: torch.dtype) -> None:
    hidden, weight = randn(130, 64, seed=1, dtype=dtype), randn(4500, 64, seed=2, dtype=dtype)
    target, key = torch.arange(130) * 31, torch.arange(130)
    torch.set_num_threads(1)
    whole, drawn = linear_logprob(hidden, weight, target, topk=3), linear_sample(hidden, weight, key)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for span in (slice(0, 1), slice(3, 20), slice(90, 130)):
            part = linear_logprob(hidden[span], weight, target[span], topk=3)
            for name in ("logprob", "logsumexp", "entropy", "sum_p2", "rank"):
                assert torch.equal(getattr(part, name), getattr(whole[span], name))
            assert part.topk is not None
            assert whole.topk is not None
            assert torch.equal(part.topk.ids, whole.topk.ids[span])
            again = linear_sample(hidden[span], weight, key[span])
            assert torch.equal(again.tokens, drawn.tokens[span])
            assert torch.equal(again.logprob, drawn.logprob[span])


def test_ties_go_to_the_lower_id_and_equal_logits_do_not_raise_the_rank() -> None:
    hidden, weight = torch.ones(2, 4), torch.zeros(5000, 4)
    weight[[7, 2100, 4999]] = 1.0
    stats = linear_logprob(hidden, weight, torch.tensor([4999, 0]), topk=5)
    assert stats.rank.tolist() == [1, 4]
    assert stats.topk is not None
    assert stats.topk.ids.tolist() == [[7, 2100, 4999, 0, 1]] * 2
    assert linear_sample(hidden, weight, torch.zeros(2, dtype=torch.int64), temperature=0.0).tokens.tolist() == [7, 7]


@settings(max_examples=30)
@given(
    vocabulary=st.integers(1, 300),
    top_k=st.integers(0, 310),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.99999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    distinct=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_filters_keep_what_the_reference_keeps(
    vocabulary: int, top_k: int, top_p: float, min_p: float, temperature: float, distinct: int, seed: int
) -> None:
    """Draws equal the reference's: noise added to the logits that it keeps. The logits take few values, so many tie."""
    values = randn(distinct, seed=seed) * 3
    logits = values[torch.randint(distinct, (6, vocabulary), generator=torch.Generator().manual_seed(seed))]
    logits[0, : vocabulary // 2] = -torch.inf
    key = torch.arange(6) + seed
    kept = keep_likely(logits / temperature, top_k, top_p, min_p)
    expected = (kept + gumbel_noise(key, vocabulary)).argmax(1)
    ours = sample(logits, key, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(ours, expected)


@each_dtype
@pytest.mark.parametrize("width", [1, 15, 16, 17, 100, 1024])
def test_norms_and_gates_equal_float64(width: int, dtype: torch.dtype) -> None:
    x, residual = randn(7, width + 4, seed=1, dtype=dtype)[:, 2 : width + 2] * 3, randn(7, width, seed=2, dtype=dtype)
    weight = randn(width, seed=3, dtype=dtype)
    close = {"rtol": 4 * ROUNDING[dtype], "atol": 4 * ROUNDING[dtype]}
    for offset in (None, 1.0):
        exact = rms_norm_reference(x.double(), weight.double(), 1e-5, offset=offset)
        torch.testing.assert_close(rms_norm(x, weight, 1e-5, offset=offset).double(), exact, **close)
        normed, total = add_rms_norm(x, residual, weight, 1e-5, offset=offset)
        assert torch.equal(total, residual + x)
        zeros = torch.zeros(7, width).double()
        expected, _ = add_rms_norm_reference(total.double(), zeros, weight.double(), 1e-5, offset=offset)
        torch.testing.assert_close(normed.double(), expected, **close)
    both = randn(7, 2 * width, seed=4, dtype=dtype) * 4
    gate, up = both.double().chunk(2, 1)
    close = {"rtol": 2 * ROUNDING[dtype] + 1e-6, "atol": 1e-6}
    torch.testing.assert_close(swiglu(both).double(), torch.nn.functional.silu(gate) * up, **close)
    gelu = torch.nn.functional.gelu(gate, approximate="tanh")
    torch.testing.assert_close(geglu(both).double(), gelu * up, **close)
    clamped = clamped_swiglu_reference(both.double(), alpha=1.5, limit=3.0)
    torch.testing.assert_close(clamped_swiglu(both, alpha=1.5, limit=3.0).double(), clamped, **close)


@each_dtype
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rotated"),
    [(1, 1, 2, 2), (4, 2, 16, 16), (6, 2, 80, 20), (5, 5, 34, 2), (8, 1, 128, 96), (2, 1, 70, 66)],
)
@pytest.mark.parametrize(("normed", "offset"), [(False, None), (True, None), (True, 1.0)])
def test_cache_writes_equal_the_reference(
    heads: int, kv_heads: int, width: int, rotated: int, normed: bool, offset: float | None, dtype: torch.dtype
) -> None:
    qkv = randn(6, heads + 2 * kv_heads, width, seed=1, dtype=dtype)
    angle = randn(6, rotated // 2, seed=2) * 50
    norms = {"q_norm": randn(width, seed=3, dtype=dtype), "k_norm": randn(width, seed=4, dtype=dtype)} if normed else {}
    norms_and_offset: dict[str, Any] = {**norms, "norm_offset": offset}
    slot = torch.tensor([5, -1, 0, 11, -3, 7])
    pages = torch.full((2, 2, 3, 4, kv_heads, width), torch.nan, dtype=dtype)
    k, v = split_layer(pages[0])
    q = write_kv(qkv, angle.cos(), angle.sin(), k, v, slot, heads=heads, **norms_and_offset)
    wide = pages[1].double()
    norms_and_offset |= {name: norm.double() for name, norm in norms.items()}
    exact = write_kv_reference(
        qkv.double(), angle.cos(), angle.sin(), wide[0], wide[1], slot, heads=heads, **norms_and_offset
    )  # fmt: skip
    if not normed:
        assert torch.equal(q[..., rotated:], qkv[:, :heads, rotated:])
    close: dict[str, Any] = {"rtol": 6 * ROUNDING[dtype], "atol": 12 * ROUNDING[dtype], "equal_nan": True}
    torch.testing.assert_close(q.double(), exact, **close)
    torch.testing.assert_close(unpack_keys(k, width).double(), wide[0], **close)
    torch.testing.assert_close(v.double(), wide[1], **close)


def test_special_values_keep_their_meaning() -> None:
    huge = torch.tensor([[100.0, -100.0, 3e38, torch.nan, 0.0, -torch.inf]])
    gate_up = torch.cat((huge, torch.ones_like(huge)), 1)
    torch.testing.assert_close(swiglu(gate_up)[:, :5], torch.nn.functional.silu(huge)[:, :5], equal_nan=True)
    for values in (gate_up, gate_up.flip(1)):
        torch.testing.assert_close(clamped_swiglu(values), clamped_swiglu_reference(values), equal_nan=True)
    with pytest.raises(NonFiniteLogits):
        linear_logprob(torch.tensor([[torch.nan, 1.0]]), torch.ones(5, 2), torch.tensor([0]))
    with pytest.raises(NonFiniteLogits):
        linear_sample(torch.tensor([[torch.inf, 1.0]]), torch.ones(5, 2), torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gate_far_below_zero_is_shut(dtype: torch.dtype) -> None:
    """Beyond the largest e^x, where a bounded one would let through a gate as large as itself."""
    gate = torch.tensor([[-80.0, -100.0, -1e13, -1e30, -3e38]], dtype=dtype)
    gate_up = torch.cat((gate, torch.ones_like(gate)), 1)
    for gated in (swiglu, geglu, clamped_swiglu):
        assert bool((gated(gate_up).abs() < 1e-30).all())


@pytest.mark.parametrize("banned", [slice(0, 64), slice(0, 2048), slice(2048, 4096), slice(4200, 5000)], ids=str)
def test_an_entry_far_below_the_others_counts_as_banned(banned: slice) -> None:
    """The lowest float is a usual mask: its distance to a peak, times a probability of 0, is no NaN."""
    hidden, weight, bias = randn(3, 16), randn(5000, 16, seed=1), torch.zeros(5000)
    target = torch.tensor([4100, 4101, 4102])
    scores = {}
    for low in (torch.finfo(torch.float32).min, -torch.inf):
        bias[banned] = low
        scores[low] = linear_logprob(hidden, weight, target, bias=bias)
    a, b = scores.values()
    for name in ("logprob", "logsumexp", "entropy", "sum_p2", "rank"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_a_long_tail_next_to_a_likely_token_is_not_rounded_away(instructions: str) -> None:
    """The tail is lost of the lane that holds the likely token, in its block of the vocabulary alone."""
    lost = 4e-3 if instructions in ("generic", "neon") else 2e-3  # these have four lanes, others eight or more
    vocabulary, peak = 151_936, 20.0
    weight = torch.zeros(vocabulary, 1)
    weight[7] = peak
    stats = linear_logprob(torch.ones(1, 1), weight, torch.tensor([7]))
    tail = (vocabulary - 1) * math.exp(-peak)
    assert stats.logprob.item() == pytest.approx(-math.log1p(tail), rel=lost)
    assert stats.entropy.item() == pytest.approx(math.log1p(tail) + peak * tail / (1 + tail), rel=lost)


def test_a_min_p_that_rounds_to_one_keeps_the_largest() -> None:
    logits = torch.tensor([[0.0, 0.5, -3.0, 0.4999]]).repeat(50, 1)
    assert sample(logits, torch.arange(50), min_p=1.0 - 2.0**-30).tolist() == [1] * 50
