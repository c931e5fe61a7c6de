"""Rotary position embedding (Su et al., 2021), in the half-split layout of Hugging Face checkpoints.

    (a, b) -> (a cos - b sin, b cos + a sin),  a and b the halves of the first R numbers of a head, cos and sin of
                                               position * f

R is the head dim, or less in models that rotate a part of every head (partial rotary); the other numbers stay. The
types differ in the frequencies f and in a factor on cos and sin: `default`, `linear` (Chen et al., 2023), `llama3`
(Llama 3.1 release), `yarn` (Peng et al., 2023) and `longrope` (Ding et al., 2024). A cached key keeps the angle that it
was written with. So `dynamic`, whose frequencies change as a sequence grows, is not supported, and `longrope` uses its
long factors at every sequence length where the model has more positions than its original, else its short ones.

Shapes:  N rows   H heads   E head dim   R rotary width, even and at most E
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.threads import num_threads

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def rope_frequencies(parameters: Mapping[str, object], rotary_width: int, max_positions: int) -> tuple[Tensor, float]:
    """Return the frequencies (float32 [R / 2], radians per position) and the factor on cos and sin.

    parameters: the checkpoint's `rope_parameters` with `rope_theta`, `rope_type` and that type's own fields; of them
    `partial_rotary_factor` is not read, because rotary_width, R, already counts it.
    Raises ValueError on a type outside ROPE_TYPES, and on a rotary width that is not even.
    """
    if rotary_width < 2 or rotary_width % 2:
        raise ValueError(f"the number of rotated numbers of a head must be even and at least 2, not {rotary_width}")
    kind = str(parameters.get("rope_type", "default"))
    theta = _read_number(parameters, "rope_theta", 10000.0)
    plain = 1.0 / theta ** (torch.arange(0, rotary_width, 2, dtype=torch.int64).float() / rotary_width)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / _read_number(parameters, "factor"), 1.0
    if kind == "llama3":
        return _llama3(plain, parameters, max_positions), 1.0
    if kind == "yarn":
        return _yarn(plain, parameters, theta, max_positions)
    if kind == "longrope":
        return _longrope(plain, parameters, max_positions)
    raise ValueError(f"unknown rope_type {kind!r}; supported: {', '.join(ROPE_TYPES)}")


def rotary_angles(position_N: Tensor, frequency: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * frequency, each times factor, float32 [N, R / 2].

    position_N: int32. frequency, factor: see rope_frequencies.
    """
    if position_N.device.type == "cpu" and position_N.dtype == torch.int32:
        cos, sin = (torch.empty(len(position_N), len(frequency)) for _ in range(2))
        _core.rotary_angles(position_N, frequency, factor, cos, sin, num_threads())
        return cos, sin
    angle = position_N.float()[:, None] * frequency
    return angle.cos() * factor, angle.sin() * factor


def rotary(x_NHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R numbers of every head of x by the angles of its row; return the shape and dtype of x.

    cos, sin: float32 [N, R / 2], see rotary_angles. The result is computed in float32 and rounded once. Raises
    ValueError on more angles than half the width of a head.
    """
    half, width = cos.shape[-1], x_NHE.shape[-1]
    if 2 * half > width:
        raise ValueError(f"rotary: {half} angles rotate {2 * half} numbers of a head, which has {width}")
    wide = x_NHE.to(torch.promote_types(x_NHE.dtype, torch.float32))
    first, second, rest = torch.split(wide, [half, half, width - 2 * half], dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x_NHE.dtype)


def _llama3(plain: Tensor, parameters: Mapping[str, object], max_positions: int) -> Tensor:
    factor = _read_number(parameters, "factor")
    low, high = _read_number(parameters, "low_freq_factor"), _read_number(parameters, "high_freq_factor")
    original = _read_number(parameters, "original_max_position_embeddings", max_positions)
    turns = original * plain / (2 * math.pi)  # number of turns of each frequency within the original context
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * plain / factor + smooth * plain


def _yarn(plain: Tensor, parameters: Mapping[str, object], theta: float, max_positions: int) -> tuple[Tensor, float]:
    width = 2 * len(plain)
    original = _read_number(parameters, "original_max_position_embeddings", max_positions)
    has_factor = parameters.get("factor") is not None
    factor = _read_number(parameters, "factor") if has_factor else max_positions / original

    def dimension(turns: float) -> float:
        """Return the dimension whose frequency makes so many turns within the original context."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(_read_number(parameters, "beta_fast", 32.0))
    high = dimension(_read_number(parameters, "beta_slow", 1.0))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(len(plain)).float() - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0.0, 1.0)
    return plain / factor * interpolated + plain * (1 - interpolated), _yarn_factor(parameters, factor)


def _yarn_factor(parameters: Mapping[str, object], factor: float) -> float:
    if parameters.get("attention_factor") is not None:
        return _read_number(parameters, "attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return mscale(_read_number(parameters, "mscale")) / mscale(_read_number(parameters, "mscale_all_dim"))
    return mscale(1.0)


def _longrope(plain: Tensor, parameters: Mapping[str, object], max_positions: int) -> tuple[Tensor, float]:
    original = _read_number(parameters, "original_max_position_embeddings", max_positions)
    name = "long_factor" if max_positions > original else "short_factor"
    stretch = parameters.get(name)
    if (
        not isinstance(stretch, list)
        or len(stretch) != len(plain)
        or not all(isinstance(s, int | float) for s in stretch)
    ):
        raise ValueError(f"rope parameter {name!r} must be a list of {len(plain)} numbers, not {stretch!r}")
    return plain / torch.tensor(stretch, dtype=torch.float32), _longrope_factor(parameters, original, max_positions)


def _longrope_factor(parameters: Mapping[str, object], original: float, max_positions: int) -> float:
    if parameters.get("attention_factor") is not None:
        return _read_number(parameters, "attention_factor")
    factor = _read_number(parameters, "factor", max_positions / original)
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


def _read_number(parameters: Mapping[str, object], name: str, default: float | None = None) -> float:
    value = parameters.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float):
        raise ValueError(f"rope parameter {name!r} must be a number, not {value!r}")
    return float(value)
