"""The attention mass's kernels, through Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from genssd.kernels import attention_mass as module
from genssd.kernels import attention_mass_triton as kernels
from genssd.kernels.attention_mass import attention_mass_reference

TILES = kernels.MassTiles(own=16, step=16, words=16, num_warps=4, num_stages=1, interpret=True)
SCALE = 0.6


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that reading it shows."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = empty(*size, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(kernels.torch, "empty", poisoned)


@dataclasses.dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    step: Tensor
    word: Tensor
    steps: int
    words: int
    upstream: Tensor

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k = self.q.double().requires_grad_(), self.k.double().requires_grad_()
        mass = attention_mass_reference(q, k, self.step, self.word, steps=self.steps, words=self.words, scale=SCALE)
        if not mass.requires_grad:
            return mass, torch.zeros_like(q), torch.zeros_like(k)
        return mass.detach(), *torch.autograd.grad((mass * self.upstream.double()).sum(), (q, k))

    def ours(self, tiles: kernels.MassTiles = TILES) -> tuple[Tensor, Tensor, Tensor]:
        given = (self.q, self.k, self.step, self.word)
        mass, lse = kernels.compute_mass(*given, self.steps, self.words, SCALE, tiles=tiles)
        return mass, *kernels.compute_mass_gradients(self.upstream, *given, lse, SCALE, tiles=tiles)


def case(
    tokens: int = 37, heads: int = 4, groups: int = 2, width: int = 8, steps: int = 3, words: int = 4, **change: Any
) -> Case:
    generator = torch.Generator().manual_seed(tokens)
    drawn = Case(
        torch.randn(tokens, heads, width, generator=generator),
        torch.randn(tokens, groups, width, generator=generator),
        torch.randint(-1, steps, (tokens,), generator=generator),
        torch.randint(-1, words, (tokens,), generator=generator),
        steps,
        words,
        torch.randn(steps, words, generator=generator),
    )
    return dataclasses.replace(drawn, **change)


def assert_agrees(given: Case, tolerance: float = 2e-6) -> None:
    for ours, exact in zip(given.ours(), given.exact(), strict=True):
        scale = float(exact.abs().max().clamp_min(1.0))
        torch.testing.assert_close(ours.double(), exact, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("tokens", [1, 16, 17, 50])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1)])
def test_tokens_and_heads(tokens: int, heads: int, groups: int) -> None:
    assert_agrees(case(tokens, heads, groups))


@pytest.mark.parametrize("width", [1, 5, 16, 33])
def test_widths(width: int) -> None:
    assert_agrees(case(width=width))


@pytest.mark.parametrize(("steps", "words"), [(1, 1), (40, 3), (2, 35), (20, 65)])
def test_steps_and_words(steps: int, words: int) -> None:
    assert_agrees(case(tokens=45, steps=steps, words=words))


def test_spans_in_order_and_words_before_them() -> None:
    step, word = torch.full((60,), -1), torch.full((60,), -1)
    for i, start in enumerate((20, 33, 51)):
        step[start : start + 9] = i
    word[3:5], word[17], word[40:42] = 0, 1, 2
    assert_agrees(case(tokens=60, step=step, word=word))


@pytest.mark.parametrize("empty", ["step", "word"])
def test_no_step_and_no_word(empty: str) -> None:
    given = case(**{empty: torch.full((37,), -1)})
    for value in given.ours():
        assert torch.equal(value, torch.zeros_like(value))


def test_half_precision() -> None:
    given = case()
    halves = dataclasses.replace(given, q=given.q.half(), k=given.k.half())
    mass, dq, dk = halves.ours()
    exact = halves.exact()
    torch.testing.assert_close(mass.double(), exact[0], atol=1e-5, rtol=1e-5)
    for ours, wide in ((dq, exact[1]), (dk, exact[2])):
        assert ours.dtype == torch.float16
        torch.testing.assert_close(ours.double(), wide, atol=2e-3 * float(wide.abs().max()), rtol=0)


@pytest.mark.parametrize(("larger", "value"), [("k", 1), ("q", 2)])
def test_small_gradients_survive_float16(larger: str, value: int) -> None:
    """dscore is of the size of the upstream gradient, in which float16 has no digits left; what comes out has."""
    given = case()
    grown = {"q": given.q / 64, "k": given.k / 64} | {larger: getattr(given, larger) * 64}
    halves = {name: tensor.half() for name, tensor in grown.items()}
    small = dataclasses.replace(given, **halves, upstream=1e-5 * given.upstream)
    ours, exact = small.ours()[value].double(), small.exact()[value]
    torch.testing.assert_close(ours, exact, atol=1e-2 * float(exact.abs().max()), rtol=0)


def test_far_scores() -> None:
    given = case()
    far = dataclasses.replace(given, q=given.q * 40)
    mass, dq, dk = far.ours()
    exact = far.exact()
    torch.testing.assert_close(mass.double(), exact[0], atol=1e-4, rtol=1e-4)
    for ours, wide in ((dq, exact[1]), (dk, exact[2])):
        torch.testing.assert_close(ours.double(), wide, atol=1e-3 * float(wide.abs().max()), rtol=0)


def test_views_of_tokens_and_heads() -> None:
    given = case()
    apart = dataclasses.replace(
        given, q=given.q.transpose(0, 1).contiguous().transpose(0, 1), k=given.k.repeat_interleave(3, 0)[::3]
    )
    for a, b in zip(given.ours(), apart.ours(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tiles", [{"own": 32}, {"step": 64}, {"words": 64}])
def test_other_tiles(tiles: dict[str, int]) -> None:
    given = case(tokens=40)
    for a, b in zip(given.ours(), given.ours(dataclasses.replace(TILES, **tiles)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_rows_of_no_step_may_hold_anything() -> None:
    given = case()
    q = given.q.clone()
    q[given.step < 0] = torch.nan
    for a, b in zip(given.ours(), dataclasses.replace(given, q=q).ours(), strict=True):
        assert torch.equal(a, b)


def test_the_operator_on_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward through torch's dispatcher, as on a GPU."""
    monkeypatch.setattr(kernels, "choose_tiles", lambda width, gradient: TILES)
    for name in ("_attention_mass", "_mass_gradients"):
        operator = getattr(module, name)
        operator.register_kernel("cpu", operator._init_fn)
    given = case()
    q, k = given.q.clone().requires_grad_(), given.k.clone().requires_grad_()
    mass, _ = module._attention_mass(q, k, given.step, given.word, given.steps, given.words, SCALE)
    gradients = torch.autograd.grad((mass * given.upstream).sum(), (q, k))
    for ours, expected in zip((mass.detach(), *gradients), given.ours(), strict=True):
        assert torch.equal(ours, expected)
    torch.library.opcheck(
        module._attention_mass,
        (q, k, given.step, given.word, given.steps, given.words, SCALE),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
