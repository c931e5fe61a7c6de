"""The attention mass's Triton kernels on a real device: values, gradients, bits, memory."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from genssd.kernels.attention_mass import attention_mass, attention_mass_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STEPS, WORDS = 7, 35
MIB = 1 << 20


class Case(NamedTuple):
    """Inputs, and a gradient of the result."""

    q: Tensor
    k: Tensor
    step: Tensor
    word: Tensor
    upstream: Tensor

    def results(self, dtype: torch.dtype) -> list[Tensor]:
        """Mass and gradients; by the reference in float64."""
        q, k = self.q.detach().to(dtype).requires_grad_(), self.k.detach().to(dtype).requires_grad_()
        function = attention_mass_reference if dtype == torch.float64 else attention_mass
        mass = function(q, k, self.step, self.word, steps=STEPS, words=WORDS, scale=q.shape[2] ** -0.5)
        return [mass.detach(), *torch.autograd.grad((mass * self.upstream.to(mass.dtype)).sum(), (q, k))]


def case(tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator("cuda").manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    # as a model hands them over: heads before tokens
    q, k = (2 * normal(n, tokens, width).to(dtype).transpose(0, 1) for n in (heads, groups))
    step = torch.randint(-1, STEPS, (tokens,), device="cuda", generator=generator)
    word = torch.randint(-1, WORDS, (tokens,), device="cuda", generator=generator)
    return Case(q, k, step, word, normal(STEPS, WORDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "width"),
    [(1, 1, 1, 64), (65, 3, 1, 64), (1000, 4, 2, 80), (777, 16, 8, 128), (300, 4, 1, 256)],
)
def test_values_and_gradients(tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype) -> None:
    given = case(tokens, heads, groups, width, dtype)
    given.step[0] = given.word[0] = 0
    ours, again, exact = given.results(dtype), given.results(dtype), given.results(torch.float64)
    torch.testing.assert_close(ours[0].double(), exact[0], atol=1e-4, rtol=1e-4)
    for mine, same, wide in zip(ours, again, exact, strict=True):
        assert torch.equal(mine, same), "the same bits in every run"
        # probabilities and their gradients are rounded to halves before the products
        assert (mine.double() - wide).norm() <= 1e-2 * wide.norm() + 1e-6


def test_small_gradients_survive_float16() -> None:
    given = case(500, 4, 2, 64, torch.float16)
    small = given._replace(upstream=1e-3 * given.upstream)
    for mine, wide in zip(small.results(torch.float16)[1:], small.results(torch.float64)[1:], strict=True):
        assert (mine.double() - wide).norm() <= 2e-2 * wide.norm()


def test_float32_takes_the_reference() -> None:
    given = case(130, 4, 2, 64, torch.float32)
    for mine, wide in zip(given.results(torch.float32), given.results(torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), wide, atol=1e-4, rtol=1e-4)


def test_no_tensor_of_tokens_times_tokens_is_built() -> None:
    """One head's scores of 16384 tokens would be 512 MiB in halves."""
    given = case(16384, 16, 8, 128, torch.bfloat16)
    given.results(torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    given.results(torch.bfloat16)
    outputs = given.q.nbytes + given.k.nbytes
    assert torch.cuda.max_memory_allocated() - before < 3 * outputs + 64 * MIB
