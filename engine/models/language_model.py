"""The interface of a model in memory, without cache and sequences: what its runner and the engine ask of it.

`model.Decoder` is the engine's own; `transformers_model.TransformersModel` has transformers compute the hidden states.
"""

from __future__ import annotations

from typing import Protocol

import torch

from genssd.engine.checkpoints.basic_config import BasicConfig
from genssd.engine.models.model_head import ModelHead


class LanguageModel(Protocol):
    """The weights of a causal language model."""

    @property
    def config(self) -> BasicConfig:
        """Vocabulary, positions and end tokens of the model."""
        ...

    @property
    def head(self) -> ModelHead:
        """The product of the hidden states with the vocabulary."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights and of the cache."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the weights and of the cache."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether kernels over the head give a row the same bits for every number of rows."""
        ...

    @property
    def attention_heads(self) -> tuple[int, int, int] | None:
        """Query heads, kv heads and head dim of the attention kernel; None where the attention is not the engine's."""
        ...

    @property
    def kv_bytes_per_token(self) -> int:
        """Number of bytes that one token takes in the cache."""
        ...

    @property
    def state_bytes(self) -> int:
        """Number of bytes that the cache of a path takes however many tokens it has."""
        ...

    @property
    def weights_per_token(self) -> int:
        """Number of weights that every token is multiplied with; biases and norms are left out."""
        ...

    @property
    def values_per_token(self) -> int:
        """Number of values of one token that a forward pass holds at once."""
        ...
