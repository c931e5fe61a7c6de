"""The options of commands that sample from a model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)  # no slots: a class derives from only one base that has them
class ModelSampling:
    """The option of a command that samples from a model."""

    generation_config: bool = False
    """Take temperature, top_p, top_k and min_p from the generation_config.json of the model that writes, in place of
    the options of `sampling`; what the file does not name filters nothing."""


@dataclass(frozen=True, kw_only=True)
class StopOptions:
    """The texts at which responses end."""

    stop: tuple[str, ...] = ()
    """Texts at each of which a response ends, such as "\\n\\nQuestion:". The names of special tokens are text here."""
    include_stop: bool = False
    """Whether a response keeps the text at which it ends, with the whole token that completes it; else the text before
    it is kept."""
