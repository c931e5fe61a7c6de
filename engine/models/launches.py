"""Which launch configurations the kernels of loaded models take on a GPU, and where they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from genssd.engine.models.language_model import LanguageModel
from genssd.kernels import tuned
from genssd.kernels.attention import SEGMENT_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRecord:
    """The launch configurations of an engine's kernels."""

    source: str
    """Where they come from: "tuned for NVIDIA H200", "partly tuned for NVIDIA H200", "shipped for sm_90", "generic"."""
    deterministic: bool
    """Whether a row has the same bits for every number of rows."""
    digest: str
    """16 hex digits, equal for equal configurations."""

    @property
    def description(self) -> str:
        """One line for a log."""
        return f"{self.source}, {'deterministic' if self.deterministic else 'the fastest for every number of rows'}"


def describe_launches(decoders: Sequence[LanguageModel]) -> LaunchRecord | None:
    """Return which configurations the kernels of models take; None for models that are not on a GPU."""
    device = decoders[0].device
    if device.type != "cuda":
        return None
    deterministic = decoders[0].deterministic
    with tuned.launch_mode(deterministic=deterministic):
        configurations = [choice for decoder in decoders for choice in _choices(decoder)]
    text = json.dumps([deterministic, *(values for values, _ in configurations)], sort_keys=True)
    num_tuned = sum(is_tuned for _, is_tuned in configurations)
    card = tuned.card_of(device)
    if num_tuned:
        source = f"{'' if num_tuned == len(configurations) else 'partly '}tuned for {card.name}"
    else:
        is_known = card.capability in tuned.SHIPPED_CAPABILITIES
        source = f"shipped for {card.capability}" if is_known else "generic"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return LaunchRecord(source=source, deterministic=deterministic, digest=digest)


def _choices(decoder: LanguageModel) -> list[tuple[tuned.Configuration, bool]]:
    """Return the configuration of every operator and class of rows, and whether it was tuned."""
    # imported here, because Triton need not be installed where there is no GPU
    from genssd.kernels.attention_triton import AttentionConfiguration
    from genssd.kernels.attention_triton import choose_configuration as choose_attention
    from genssd.kernels.draw_triton import DrawTiling, choose_draw_tiling
    from genssd.kernels.head_triton import HeadConfiguration, choose_configuration

    device, dtype = decoder.device, decoder.dtype
    vocabulary, width = decoder.head.weight.shape
    head = (vocabulary, width)
    choices: list[tuple[tuned.Configuration, bool]] = []
    for rows in tuned.SAMPLE_ROWS:
        for operator in tuned.HEAD_OPERATORS:
            values = choose_configuration(operator, device, dtype, head, rows).values()
            tuned_head = tuned.find(operator, dtype, head, device, rows, HeadConfiguration.from_values)
            choices.append((values, tuned_head is not None))
        values = choose_draw_tiling(device, vocabulary, rows).values()
        tiling = tuned.find("draw", torch.float32, head[:1], device, rows, DrawTiling.from_values)
        choices.append((values, tiling is not None))
    heads = decoder.attention_heads
    if heads is None:
        return choices
    values = choose_attention(device, dtype, heads, SEGMENT_TOKENS["cuda"]).values()
    attention = tuned.find("attention", dtype, heads, device, 1, AttentionConfiguration.from_values)
    return [*choices, (values, attention is not None)]
