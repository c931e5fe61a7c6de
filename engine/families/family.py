"""What describes a model family: how its models differ from those of the Llama class, and how checkpoints name that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from genssd.engine.families.shape import LLAMA_NAMES, ActivationName, LayerNames

SILU: Mapping[str, ActivationName] = {"silu": "silu", "swish": "silu"}
GELU_TANH: Mapping[str, ActivationName] = {"gelu_pytorch_tanh": "gelu_tanh"}


def _no_difference(config: Any) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The models of one `model_type`."""

    architecture: str
    """Class of transformers that has the head."""
    activation_field: str = "hidden_act"
    """Field of config.json that names the activation."""
    activations: Mapping[str, ActivationName] = field(default_factory=lambda: SILU)
    """The activations that are supported, by their names in config.json."""
    names: LayerNames = LLAMA_NAMES
    differences: Callable[[Any], Mapping[str, Any]] = _no_difference
    """Returns, for transformers' config object, the fields of ModelConfig that are not what a Llama of this config has.

    It may raise ValueError with a message that names the field which is not supported."""


def scaled(**multipliers: float) -> Mapping[str, Any]:
    """Return fields of ModelConfig without those multipliers that are 1, so that nothing is multiplied by them."""
    return {name: None if value == 1 else float(value) for name, value in multipliers.items()}
