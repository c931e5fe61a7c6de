"""The option of commands that sample from a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)  # no slots: a class derives from only one base that has them
class ModelSampling:
    """The option of a command that samples from a model."""

    generation_config: bool = False
    """Take temperature, top_p, top_k and min_p from the generation_config.json of the model that writes, in place of
    the options of `sampling`; what the file does not name filters nothing."""
