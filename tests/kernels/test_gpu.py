"""The Triton kernels on a real device."""

from __future__ import annotations

import pytest
import torch

from genssd.kernels.logprob import STATISTICS, linear_logprob

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 1, 1), (65, 1025, 100), (300, 151936, 1024)])
def test_linear_logprob_is_as_accurate_as_torch(dtype: torch.dtype, rows: int, vocabulary: int, width: int) -> None:
    hidden = torch.randn(rows, width, device="cuda").to(dtype)
    weight = (torch.randn(vocabulary, width, device="cuda") / width**0.5).to(dtype)
    target = torch.randint(0, vocabulary, (rows,), device="cuda")
    z = hidden.double() @ weight.double().T
    exact = z.log_softmax(1).gather(1, target[:, None])[:, 0]
    plain = (hidden @ weight.T).float().log_softmax(1).gather(1, target[:, None])[:, 0]
    ours = linear_logprob(hidden, weight, target)
    budget = (plain - exact).abs().max()
    assert (ours.logprob - exact).abs().max() <= 2 * budget + 1e-5
    entropy = -(z.log_softmax(1).exp() * z.log_softmax(1)).sum(1)
    torch.testing.assert_close(ours.entropy.double(), entropy, atol=1e-3, rtol=1e-3)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    hidden = torch.randn(513, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(5000, 512, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(0, 5000, (513,), device="cuda")
    whole = linear_logprob(hidden, weight, target)
    order = torch.randperm(513, device="cuda")
    permuted = linear_logprob(hidden[order], weight, target[order])
    alone = linear_logprob(hidden[7:8], weight, target[7:8])
    for name in STATISTICS:
        values = getattr(whole, name)
        assert torch.equal(values[order], getattr(permuted, name)), name
        assert torch.equal(values[7:8], getattr(alone, name)), name
