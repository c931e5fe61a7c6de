"""Attention mass against einsum over the full attention matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genssd.kernels import attention_mass as module
from genssd.kernels.attention_mass import attention_mass


def by_einsum(
    q: torch.Tensor, k: torch.Tensor, step: torch.Tensor, word: torch.Tensor, steps: int, words: int, scale: float
) -> torch.Tensor:
    tokens, heads, _ = q.shape
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    scores = torch.einsum("ahe,bhe->hab", q, k) * scale
    causal = torch.ones(tokens, tokens).tril().bool()
    attention = scores.masked_fill(~causal, -torch.inf).softmax(-1).mean(0)
    rows = torch.stack([(step == i).to(q.dtype) for i in range(steps)])
    columns = torch.stack([(word == j).to(q.dtype) for j in range(words)])
    return rows @ attention @ columns.T


def case(tokens: int = 13, heads: int = 4, groups: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, heads, 5, generator=generator, dtype=torch.float64)
    k = torch.randn(tokens, groups, 5, generator=generator, dtype=torch.float64)
    step = torch.randint(-1, 3, (tokens,), generator=generator)
    word = torch.randint(-1, 4, (tokens,), generator=generator)
    return q, k, step, word


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, tokens: int, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk * heads * tokens * 8)
    q, k, step, word = case(tokens, heads, groups)
    q.requires_grad_()
    k.requires_grad_()
    found = attention_mass(q, k, step, word, steps=3, words=4, scale=0.7)
    expected = by_einsum(q, k, step, word, 3, 4, 0.7)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    wanted = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if not bool((step >= 0).any()):
        assert not bool(found.any())
        return
    theirs = torch.autograd.grad((expected * wanted).sum(), [q, k])
    for a, b in zip(torch.autograd.grad((found * wanted).sum(), [q, k]), theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_all_tokens_as_words_sum_to_the_steps_length() -> None:
    q, k, step, _ = case()
    mass = attention_mass(q, k, step, torch.arange(13), steps=3, words=13, scale=1.0)
    torch.testing.assert_close(mass.sum(1), torch.bincount(step[step >= 0], minlength=3).double())


def test_half_precision_is_summed_in_float32() -> None:
    q, k, step, word = case()
    q, k = q.bfloat16(), k.bfloat16()
    mass = attention_mass(q, k, step, word, steps=3, words=4, scale=1.0)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(
        mass.double(),
        by_einsum(q.bfloat16().double(), k.bfloat16().double(), step, word, 3, 4, 1.0),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(12, 2, 5)}, "do not agree"),
        ({"k": torch.zeros(13, 3, 5)}, "do not agree"),
        ({"step": torch.zeros(12, dtype=torch.int64)}, "step must be int64"),
        ({"step": torch.full((13,), 3)}, "step must lie in -1..2"),
        ({"word": torch.zeros(13)}, "word must be int64"),
        ({"word": torch.full((13,), -2)}, "word must lie in -1..3"),
    ],
)
def test_what_it_refuses(change: dict[str, Any], message: str) -> None:
    q, k, step, word = case()
    inputs = {"q": q, "k": k, "step": step, "word": word, **change}
    with pytest.raises(ValueError, match=message):
        attention_mass(inputs["q"], inputs["k"], inputs["step"], inputs["word"], steps=3, words=4, scale=1.0)
