"""Words by which options name one of the two models, and who computes them."""

from __future__ import annotations

from typing import Literal

Role = Literal["teacher", "student"]
BOTH: tuple[Role, Role] = ("teacher", "student")

Backend = Literal["auto", "genssd", "transformers"]
"""Who computes the hidden states of a model: the engine's own decoder, or transformers' class. auto: the own decoder
where it knows the model_type."""
