"""Norm, activation and rotary embedding against transformers' own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3 import modeling_phi3

from genssd.kernels.activation import clamped_swiglu, geglu, swiglu
from genssd.kernels.inference import refuse_gradients
from genssd.kernels.norm import add_rms_norm, rms_norm
from genssd.kernels.rotary import ROPE_TYPES, rope_frequencies, rotary, rotary_angles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("module", "offset"), [(LlamaRMSNorm, None), (GptOssRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
@torch.inference_mode()
def test_rms_norm_equals_transformers(module: Any, offset: float | None, dtype: torch.dtype) -> None:
    x = (torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0)) * 7).to(dtype)
    theirs = module(64, eps=1e-5).to(dtype)
    theirs.weight.copy_(torch.linspace(-1, 2, 64))
    # in float32 the sum of squares may be taken in another order; halves do not see that
    tolerance = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.0
    torch.testing.assert_close(rms_norm(x, theirs.weight, 1e-5, offset=offset), theirs(x), rtol=tolerance, atol=0)


def test_a_norm_with_an_offset_is_rounded_once() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.linspace(-1, 2, 64).bfloat16()
    exact = rms_norm(x.double(), weight.double(), 1e-5, offset=1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, offset=1).double(), exact, atol=1e-6, rtol=2.0**-8)


def test_a_weight_of_another_kind_is_refused() -> None:
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^rms_norm: weight must be torch.bfloat16 \[8\], not torch.float32 \[8\]"):
        rms_norm(x, torch.ones(8), 1e-5, offset=1.0)
    with pytest.raises(ValueError, match=r"^add_rms_norm: weight must be torch.bfloat16 \[8\], not .* \[9\]"):
        add_rms_norm(x, x, torch.ones(9, dtype=torch.bfloat16), 1e-5)


def test_rms_norm_of_tiny_and_large_rows() -> None:
    weight = torch.ones(8)
    assert torch.equal(rms_norm(torch.zeros(2, 8), weight, 1e-6), torch.zeros(2, 8))
    torch.testing.assert_close(rms_norm(torch.full((1, 8), 1e15), weight, 1e-6), torch.ones(1, 8))
    # the mean of squares is in float32: 60000^2 overflows float16
    half = torch.full((1, 8), 6e4, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(half, weight.half(), 1e-6), torch.ones(1, 8, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [None, 1.0])
def test_add_rms_norm_is_a_sum_and_a_norm(offset: float | None, dtype: torch.dtype) -> None:
    x, residual = (3 * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(4))).to(dtype)
    before = residual.clone()
    weight = torch.linspace(-1, 2, 64).to(dtype)
    normed, total = add_rms_norm(x, residual, weight, 1e-5, offset=offset)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rms_norm(residual + x, weight, 1e-5, offset=offset))
    assert torch.equal(residual, before)


def gates(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate_up = torch.randn(7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    return gate_up, gate_up[:, :5].double(), gate_up[:, 5:].double()


def test_swiglu_gates_with_the_first_half() -> None:
    gate_up, gate, up = gates()
    torch.testing.assert_close(swiglu(gate_up), gate / (1 + (-gate).exp()) * up, atol=1e-14, rtol=1e-12)


def test_geglu_is_gelu_by_tanh() -> None:
    gate_up, gate, up = gates()
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(geglu(gate_up), 0.5 * gate * (1 + inner.tanh()) * up, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("limit", [7.0, 0.5])
def test_clamped_swiglu_bounds_gate_and_up(limit: float) -> None:
    gate_up, gate, up = gates()
    gate, up = gate.minimum(torch.tensor(limit)), up.clip(-limit, limit)
    exact = (up + 1) * gate / (1 + (-1.702 * gate).exp())
    torch.testing.assert_close(clamped_swiglu(gate_up, limit=limit), exact, atol=1e-14, rtol=1e-12)
    with pytest.raises(ValueError, match="limit must be above 0, not -1"):
        clamped_swiglu(gate_up, limit=-1)


@pytest.mark.parametrize("activation", [swiglu, geglu, clamped_swiglu])
def test_halves_are_rounded_once(activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    gate_up, _, _ = gates(torch.bfloat16)
    exact = activation(gate_up.double())
    ours = activation(gate_up)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, atol=1e-6, rtol=2.0**-8)  # half a unit in the last place


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONGROPES: dict[str, dict[str, Any]] = {
    "longrope-long": {"factor": 8.0, "original_max_position_embeddings": 4096},
    "longrope-of-lengths": {"original_max_position_embeddings": 4096},
    "longrope-attention-factor": {"original_max_position_embeddings": 4096, "attention_factor": 1.25},
}
ROPES = [
    pytest.param({"rope_type": "default", "rope_theta": 1e4}, id="default"),
    pytest.param({"rope_type": "default", "rope_theta": 1e6}, id="default-wide"),
    pytest.param({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}, id="linear"),
    pytest.param({"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}, id="llama3"),
    pytest.param(
        {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0},
        id="llama3-8k",
    ),
    pytest.param(
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}, id="yarn"
    ),
    pytest.param(
        {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 8.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
        id="yarn-betas-untruncated",
    ),
    pytest.param(
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        id="yarn-mscale",
    ),
    pytest.param(
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "attention_factor": 1.25,
        },
        id="yarn-attention-factor",
    ),
    *(pytest.param({"rope_type": "longrope", "rope_theta": 1e4, **more}, id=name) for name, more in LONGROPES.items()),
]


def stretched(parameters: dict[str, Any], rotary_width: int) -> dict[str, Any]:
    """longrope has a factor per frequency."""
    if parameters["rope_type"] != "longrope":
        return dict(parameters)
    short, long = torch.linspace(1, 2, rotary_width // 2), torch.linspace(1, 40, rotary_width // 2)
    return {**parameters, "short_factor": short.tolist(), "long_factor": long.tolist()}


@pytest.mark.parametrize(("head_dim", "part"), [(16, 1.0), (64, 0.5), (80, 0.4), (128, 1.0), (128, 0.75)])
@pytest.mark.parametrize("parameters", ROPES)
def test_frequencies_equal_transformers(parameters: dict[str, Any], head_dim: int, part: float) -> None:
    """part: the fraction of every head that is rotated, as GLM's, Phi's and Nemotron's checkpoints give it."""
    rotary_width = int(head_dim * part)
    parameters = {**stretched(parameters, rotary_width), "partial_rotary_factor": part}
    original = parameters.get("original_max_position_embeddings", 512)
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=int(original * parameters.get("factor", 4.0)),
        rope_parameters=dict(parameters),
    )
    if parameters["rope_type"] == "default":
        expected, factor = modeling_phi3.Phi3RotaryEmbedding.compute_default_rope_parameters(config)
    else:
        longest = config.max_position_embeddings
        expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"), longest)
    ours, our_factor = rope_frequencies(parameters, rotary_width, config.max_position_embeddings)
    torch.testing.assert_close(ours, expected.float(), atol=0, rtol=2e-6)
    assert our_factor == pytest.approx(factor, rel=1e-12)


def test_longrope_of_a_model_that_is_not_longer_takes_the_short_factors() -> None:
    parameters = stretched({"rope_type": "longrope", "original_max_position_embeddings": 512}, 16)
    frequency, factor = rope_frequencies(parameters, 16, 512)
    plain, _ = rope_frequencies({}, 16, 512)
    torch.testing.assert_close(frequency * torch.tensor(parameters["short_factor"]), plain)
    assert factor == 1.0


def test_every_type_of_transformers_is_supported_or_refused() -> None:
    """`dynamic` changes with the length of a sequence; `proportional` is Gemma's, whose frequencies count the whole
    width of heads that turn in part."""
    assert {"default", *ROPE_INIT_FUNCTIONS} - set(ROPE_TYPES) == {"dynamic", "proportional"}


def test_rotation_equals_transformers() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=ROPES[1].values[0])
    position = torch.tensor([0, 1, 2, 77, 4000, 131071], dtype=torch.int32)
    x = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(2))
    cos, sin = LlamaRotaryEmbedding(config)(x, position[None].long())
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    frequency, factor = rope_frequencies(ROPES[1].values[0], 32, 131072)  # type: ignore[arg-type]
    ours = rotary(x, *rotary_angles(position, frequency, factor))
    # a frequency may differ in its last bit, which turns the angle by position * 2^-23
    budget = 1e-6 + 2.0**-23 * position.float()[:, None, None] * x.norm(dim=-1, keepdim=True)
    assert bool(((ours - expected[0].transpose(0, 1)).abs() <= budget).all())
    assert torch.equal(ours[0], x[0])


@pytest.mark.parametrize("part", [2, 6, 24, 30])
def test_a_part_of_a_head_rotates_as_in_transformers(part: int) -> None:
    x = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(2))
    cos, sin = rotary_angles(torch.arange(6, dtype=torch.int32) * 77, *rope_frequencies({}, part, 512))
    both = (torch.cat((angles, angles), -1)[None] for angles in (cos, sin))
    expected, _ = modeling_phi3.apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], *both)
    ours = rotary(x, cos, sin)
    torch.testing.assert_close(ours, expected[0].transpose(0, 1), atol=1e-6, rtol=0)
    assert torch.equal(ours[..., part:], x[..., part:])


def test_more_angles_than_a_head_has_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="5 angles rotate 10 numbers of a head, which has 8"):
        rotary(torch.zeros(1, 1, 8), torch.zeros(1, 5), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="even and at least 2, not 7"):
        rope_frequencies({}, 7, 512)


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    frequency, factor = rope_frequencies({"rope_type": "default", "rope_theta": 1e4}, 64, 512)
    q, k = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(3))

    def at(x: torch.Tensor, position: int) -> torch.Tensor:
        return rotary(x, *rotary_angles(torch.tensor([position]), frequency, factor)).flatten()

    assert float(at(q, 300).norm()) == pytest.approx(float(q.norm()), rel=1e-6)
    assert float(at(q, 40) @ at(k, 9)) == pytest.approx(float(at(q, 140) @ at(k, 109)), abs=1e-4)
    assert abs(float(at(q, 40) @ at(k, 9)) - float(at(q, 40) @ at(k, 10))) > 1e-3


def test_an_unknown_type_and_a_missing_number_are_named() -> None:
    with pytest.raises(ValueError, match=r"'dynamic'.*default, linear, llama3, yarn, longrope"):
        rope_frequencies({"rope_type": "dynamic"}, 16, 512)
    with pytest.raises(ValueError, match="'factor'"):
        rope_frequencies({"rope_type": "linear"}, 16, 512)
    with pytest.raises(ValueError, match="'low_freq_factor'"):
        rope_frequencies({"rope_type": "llama3", "factor": 2.0}, 16, 512)
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 128, "short_factor": [1.0] * 8}
    for wrong in (None, [1.0] * 7, ["1.0"] * 8):
        with pytest.raises(ValueError, match="'long_factor' must be a list of 8 numbers"):
            rope_frequencies({**longrope, "long_factor": wrong}, 16, 512)


def test_rotation_of_halves_is_rounded_once() -> None:
    x = torch.randn(9, 2, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    angles = rotary_angles(torch.arange(9), *rope_frequencies({}, 64, 512))
    exact = rotary(x.double(), *angles)
    torch.testing.assert_close(rotary(x, *angles).double(), exact, atol=1e-6, rtol=2.0**-8)


def test_a_gradient_that_would_be_lost_is_refused() -> None:
    trained, frozen = torch.zeros(2, requires_grad=True), torch.zeros(2)
    refuse_gradients("swiglu", frozen, None)
    with torch.no_grad():
        refuse_gradients("swiglu", frozen, trained)
    with pytest.raises(ValueError, match=r"swiglu is not differentiated.*inference_mode"):
        refuse_gradients("swiglu", frozen, trained)
