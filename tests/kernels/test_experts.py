"""Experts against transformers' own modules and against float64, and bits that do not depend on the batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from genssd import _core
from genssd.kernels.activation import Activation, clamped_swiglu, geglu, swiglu
from genssd.kernels.experts import ExpertWeights, expert_mlp, expert_mlp_reference, route
from genssd.kernels.linear import linear
from genssd.kernels.weight import pack_weight

SETS = _core.instruction_sets()
EXPERTS, TOP_K, WIDTH, FEED = 7, 3, 37, 21
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture
def best_set_afterwards() -> Iterator[None]:
    yield
    _core.use_instruction_set(SETS[0])


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(dtype: torch.dtype = torch.float32, *, biased: bool = True) -> ExpertWeights:
    return ExpertWeights(
        gate_up=randn(EXPERTS, 2 * FEED, WIDTH, seed=1, dtype=dtype) / 4,
        gate_up_bias=randn(EXPERTS, 2 * FEED, seed=2, dtype=dtype) if biased else None,
        down=randn(EXPERTS, WIDTH, FEED, seed=3, dtype=dtype) / 4,
        down_bias=randn(EXPERTS, WIDTH, seed=4, dtype=dtype) if biased else None,
    )


def packed(weights: ExpertWeights) -> ExpertWeights:
    gate_up, down = (tuple(map(pack_weight, stack)) for stack in (weights.gate_up, weights.down))
    return ExpertWeights(
        gate_up=gate_up, gate_up_bias=weights.gate_up_bias, down=down, down_bias=weights.down_bias
    )  # fmt: skip


def rows(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, their experts, of which the last is never chosen, and the experts' weights."""
    expert, weight = route(randn(count, EXPERTS - 1, seed=5, dtype=dtype), TOP_K, normalize=True, select_first=False)
    return randn(count, WIDTH, seed=6, dtype=dtype), expert, weight


def exact_sums(
    h_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, weights: ExpertWeights, activation: Activation
) -> Tensor:
    """The layer in float64, row by row."""
    out = torch.zeros(len(h_ND), WIDTH, dtype=torch.float64)
    for n, (chosen, factors) in enumerate(zip(expert_NK.tolist(), weight_NK.double(), strict=True)):
        for e, factor in zip(chosen, factors, strict=True):
            gate_up = weights.gate_up[e].double() @ h_ND[n].double()  # type: ignore[union-attr]
            gate_up += 0 if weights.gate_up_bias is None else weights.gate_up_bias[e]
            y = weights.down[e].double() @ activation(gate_up[None])[0]  # type: ignore[union-attr]
            out[n] += factor * (y + (0 if weights.down_bias is None else weights.down_bias[e]))
    return out


Layer = tuple[Any, Any, ExpertWeights, dict[str, Any], Activation]
"""transformers' router and experts, and what they are here: weights, options of `route`, activation."""


def fill(module: Any) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i) / 3)
    return module


def of_mixtral(config: Any, module: Any) -> Layer:
    name = config.__name__.removesuffix("Config")
    settings = config(
        hidden_size=WIDTH, num_experts_per_tok=TOP_K, num_local_experts=EXPERTS, num_experts=EXPERTS,
        moe_intermediate_size=FEED, intermediate_size=FEED, norm_topk_prob=False,
    )  # fmt: skip
    settings._experts_implementation = "eager"
    router, experts = (fill(getattr(module, f"{name}{part}")(settings)) for part in ("TopKRouter", "Experts"))
    weights = ExpertWeights(gate_up=experts.gate_up_proj.detach(), down=experts.down_proj.detach())
    # Mixtral always divides by the sum, Qwen3-MoE where its config says so
    return router, experts, weights, {"normalize": name == "Mixtral", "select_first": False}, swiglu


def of_gpt_oss(config: Any, module: Any) -> Layer:
    settings = config(
        hidden_size=WIDTH,
        num_experts_per_tok=TOP_K,
        num_local_experts=EXPERTS,
        intermediate_size=FEED,
        swiglu_limit=1.0,
    )
    settings._experts_implementation = "eager"
    router, experts = fill(module.GptOssTopKRouter(settings)), fill(module.GptOssExperts(settings))
    # its matrices are transposed, and the gate's outputs alternate with those of up
    gate_up, gate_up_bias = (
        torch.cat((x[..., ::2], x[..., 1::2]), -1).detach() for x in (experts.gate_up_proj, experts.gate_up_proj_bias)
    )
    weights = ExpertWeights(
        gate_up=gate_up.transpose(1, 2).contiguous(), gate_up_bias=gate_up_bias,
        down=experts.down_proj.detach().transpose(1, 2).contiguous(), down_bias=experts.down_proj_bias.detach(),
    )  # fmt: skip
    activation = functools.partial(clamped_swiglu, alpha=settings.swiglu_alpha, limit=1.0)
    return router, experts, weights, {"normalize": False, "select_first": True}, activation


@pytest.mark.parametrize(
    ("build", "config", "module"),
    [
        pytest.param(of_mixtral, MixtralConfig, modeling_mixtral, id="mixtral"),
        pytest.param(of_mixtral, Qwen3MoeConfig, modeling_qwen3_moe, id="qwen3-moe"),
        pytest.param(of_gpt_oss, GptOssConfig, modeling_gpt_oss, id="gpt-oss"),
    ],
)
@torch.no_grad()
def test_a_layer_equals_transformers(build: Callable[[Any, Any], Layer], config: Any, module: Any) -> None:
    router, experts, weights, choice, activation = build(config, module)
    h = randn(30, WIDTH, seed=9)
    logits, their_weight, their_expert = router(h)
    expert, weight = route(logits, TOP_K, **choice)
    assert torch.equal(expert, their_expert)
    torch.testing.assert_close(weight, their_weight, atol=1e-6, rtol=0)
    expected = experts(h, their_expert, their_weight)
    for kind in (weights, packed(weights)):
        ours = expert_mlp(h, expert, weight, kind, activation=activation)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("choice", [(True, False), (False, False), (False, True)])
def test_routing_takes_the_lower_of_equal_experts(choice: tuple[bool, bool]) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    expert, weight = route(logits, 3, normalize=choice[0], select_first=choice[1])
    assert expert.tolist() == [[1, 3, 2], [0, 1, 2]]
    exact = logits.double().softmax(1).gather(1, expert)
    if any(choice):
        exact /= exact.sum(1, keepdim=True)
    torch.testing.assert_close(weight.double(), exact, atol=1e-6, rtol=0)


def test_a_row_is_routed_alike_in_any_batch() -> None:
    logits = randn(60, 40, seed=1, dtype=torch.bfloat16)
    whole = route(logits, 6, normalize=True, select_first=False)
    for n in range(0, 60, 7):
        alone = route(logits[n : n + 1], 6, normalize=True, select_first=False)
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(whole, alone, strict=True))


def test_more_experts_of_a_row_than_experts_are_refused() -> None:
    for top_k in (0, 6):
        with pytest.raises(ValueError, match=rf"^route: top_k {top_k} must be between 1 and .* \[2, 5\]"):
            route(torch.zeros(2, 5), top_k, normalize=True, select_first=True)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.usefixtures("best_set_afterwards")
def test_values_and_bits_on_every_instruction_set(instructions: str, dtype: torch.dtype) -> None:
    """Against float64; and a row's bits are those that it has alone, in another order and on more threads."""
    _core.use_instruction_set(instructions)
    torch.set_num_threads(1)
    for activation, biased in ((swiglu, False), (geglu, True), (clamped_swiglu, True)):
        weights = layer(dtype, biased=biased)
        h, expert, weight = rows(19, dtype)
        whole = expert_mlp(h, expert, weight, packed(weights), activation=activation)
        exact = exact_sums(h, expert, weight, weights, activation)
        # the inner results are rounded to the dtype, and products sum them up
        torch.testing.assert_close(whole.double(), exact, atol=8 * ROUNDING[dtype], rtol=8 * ROUNDING[dtype])
        for span in (slice(0, 1), slice(4, 9), slice(18, 19)):
            alone = expert_mlp(h[span], expert[span], weight[span], weights, activation=activation)
            assert torch.equal(alone, whole[span])
    order = torch.arange(18, -1, -1)
    torch.set_num_threads(3)
    again = expert_mlp(h[order], expert[order].flip(1), weight[order].flip(1), weights, activation=activation)
    assert torch.equal(again, whole[order])


@pytest.mark.skipif(not SETS, reason="there is no native kernel for this processor")
def test_the_sum_over_experts_is_taken_in_float32_in_their_order() -> None:
    weights, (h, expert, weight) = layer(torch.bfloat16), rows(6, torch.bfloat16)
    total = torch.zeros(6, WIDTH)
    for e in range(EXPERTS):
        inner = swiglu(linear(h, weights.gate_up[e], weights.gate_up_bias[e]))  # type: ignore[index]
        y = linear(inner, weights.down[e], weights.down_bias[e])  # type: ignore[index]
        total += (weight * (expert == e)).sum(1, keepdim=True).float() * y.float()
    assert torch.equal(expert_mlp(h, expert, weight, weights, activation=swiglu), total.bfloat16())


def test_the_reference_equals_float64_and_has_gradients() -> None:
    weights, (h, expert, weight) = layer(torch.float64), rows(9, torch.float64)
    h, weight = h.requires_grad_(), weight.requires_grad_()
    out = expert_mlp(h, expert, weight, weights, activation=clamped_swiglu)
    exact = exact_sums(h.detach(), expert, weight.detach(), weights, clamped_swiglu)
    torch.testing.assert_close(out.detach(), exact, atol=1e-12, rtol=1e-12)
    slopes = torch.autograd.grad(out.sum(), (h, weight))
    step = 1e-6 * torch.ones_like(h)
    moved = exact_sums((h + step).detach(), expert, weight.detach(), weights, clamped_swiglu)
    assert float((moved - exact).sum() / 1e-6) == pytest.approx(float(slopes[0].sum()), rel=1e-4)
    single = layer(), rows(5)
    ours = expert_mlp(*single[1], packed(single[0]), activation=geglu)
    plain = expert_mlp_reference(*single[1], packed(single[0]), activation=geglu)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_no_rows_and_a_nan_that_stays_in_its_row() -> None:
    h, expert, weight = rows(8)
    assert expert_mlp(h[:0], expert[:0], weight[:0], layer(), activation=swiglu).shape == (0, WIDTH)
    h[3, 5] = torch.nan
    broken = expert_mlp(h, expert, weight, layer(), activation=swiglu).isnan().any(1)
    assert broken.nonzero().tolist() == [[3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"down": torch.zeros(EXPERTS, FEED, WIDTH)},
            r"gate_up \[7, 42, 37\] and down \[7, 21, 37\] must be \[X, 2 F, D\]",
        ),
        ({"down": torch.zeros(EXPERTS - 1, WIDTH, FEED)}, r"down \[6, 37, 21\]"),
        ({"down": torch.zeros(EXPERTS, WIDTH, FEED).half()}, "gate_up is torch.float32, and down torch.float16"),
        ({"down": torch.zeros(EXPERTS, FEED, WIDTH).transpose(1, 2)}, r"down must be .* contiguous rows"),
        ({"gate_up": ()}, "gate_up must hold matrices of one shape and dtype, and at least one"),
        ({"gate_up": (torch.zeros(2, 3), torch.zeros(2, 4))}, "gate_up must hold matrices of one shape"),
        ({"down_bias": torch.zeros(EXPERTS, FEED)}, r"down_bias must be torch.float32 \[7, 37\]"),
        ({"gate_up_bias": torch.zeros(EXPERTS, 2 * FEED).half()}, r"gate_up_bias must be .* not torch.float16"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    stacks = {"gate_up": layer().gate_up, "down": layer().down}
    with pytest.raises(ValueError, match=f"^experts: .*{message}"):
        ExpertWeights(**{**stacks, **change})


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(4, FEED), r"h must be torch.float32 \[N, 37\]"),
        (0, torch.zeros(4, WIDTH).half(), "h must be torch.float32"),
        (1, torch.zeros(4, TOP_K, dtype=torch.int32), r"expert must be int64 \[4, K\]"),
        (1, torch.zeros(4, 0, dtype=torch.int64), "expert must be .* with K at least 1"),
        (1, torch.full((4, TOP_K), EXPERTS), "experts must be from 0 to 6"),
        (1, torch.full((4, TOP_K), -1), "experts must be from 0 to 6"),
        (2, torch.zeros(4, TOP_K).half(), r"weight must be torch.float32 \[4, 3\]"),
        (2, torch.zeros(4, TOP_K + 1), r"weight must be torch.float32 \[4, 3\]"),
    ],
)
@pytest.mark.skipif(not SETS, reason="there is no native kernel for this processor")
def test_rows_that_do_not_fit_are_refused(index: int, value: Tensor, message: str) -> None:
    given = list(rows(4))
    given[index] = value
    with pytest.raises(ValueError, match=f"^expert_mlp: {message}"):
        expert_mlp(*given, layer(), activation=swiglu)


def test_packed_weights_are_for_the_cpu() -> None:
    h, expert, weight = (x.to("meta") for x in rows(4))
    with pytest.raises(ValueError, match="on meta gate_up and down must be one tensor each"):
        expert_mlp(h, expert, weight, packed(layer()), activation=swiglu)


def test_a_gradient_that_would_be_lost_is_refused() -> None:
    h, expert, weight = rows(4)
    with pytest.raises(ValueError, match="expert_mlp is not differentiated"):
        expert_mlp(h.requires_grad_(), expert, weight, layer(), activation=swiglu)
