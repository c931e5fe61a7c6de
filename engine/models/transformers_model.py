"""A causal language model whose hidden states transformers computes: for classes that `model.Decoder` does not know.

    base model of transformers, over the cache of one path (path_cache.py) -> hidden states -> the engine's own head

Shapes:  N tokens of one path   D model width   V vocabulary
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from genssd.engine.cache.path_cache import count_bytes, fork_cache, make_cache
from genssd.engine.checkpoints.basic_config import BasicConfig
from genssd.engine.checkpoints.config import load_config
from genssd.engine.common.errors import CheckpointError
from genssd.engine.common.quoting import one_line
from genssd.engine.models.model_head import ModelHead
from genssd.engine.models.transformers_loading import base_of, layers_of, load_model, logits_divisor, logits_softcap
from genssd.engine.texts.text import Tokenizer

CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""Names by which base models take their cache."""
PROBE = (5, 1, 4, 2, 7, 3, 6, 0)
"""Token ids by which a model is tried."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest relative difference between hidden states that are computed at once and over the cache, by dtype. In bfloat16
an expert more or less may be chosen."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TransformersModel:
    """A model of transformers with what the engine asks of a `LanguageModel`."""

    config: BasicConfig
    module: Any
    """The causal language model, an object of transformers, in evaluation mode."""
    head: ModelHead
    cache_argument: str
    kv_bytes_per_token: int = 0
    state_bytes: int = 0
    stepwise: bool = False
    """Whether tokens after the first piece of a path are computed one by one, because the class is wrong otherwise."""

    @staticmethod
    def load(
        directory: Path, tokenizer: Tokenizer, dtype: torch.dtype, device: torch.device, *, deterministic: bool = True
    ) -> TransformersModel:
        """Load a checkpoint and try its cache.

        Raises CheckpointError on weights that are missing, misshapen or unknown, on a head that is more than a product
        with a softcap or a divisor, and on a model whose hidden states depend on later tokens or differ over its cache.
        """
        config = load_config(directory)
        module = load_model(directory, tokenizer, device, dtype=dtype).eval().requires_grad_(False)
        kind = type(module).__name__
        accepted = inspect.signature(base_of(module).forward).parameters
        argument = next((name for name in CACHE_ARGUMENTS if name in accepted), None)
        if argument is None or not module._supports_default_dynamic_cache():
            raise CheckpointError(f"{directory}: {kind} has no cache object that can be copied, which branches need")
        weight = module.get_output_embeddings().weight
        model = TransformersModel(
            config=dataclasses.replace(config, vocab_size=weight.shape[0]),
            module=module,
            head=ModelHead(
                weight=weight.data,
                softcap=logits_softcap(module),
                divisor=logits_divisor(module),
                deterministic=deterministic,
            ),
            cache_argument=argument,
        )
        for stepwise in (False, True):
            model = dataclasses.replace(model, stepwise=stepwise)
            try:
                difference, per_token, state = model._try_cache()
            except Exception as error:  # model classes raise what their arithmetic does
                raise CheckpointError(f"{directory}: {kind} cannot run over a cache: {one_line(error)}") from None
            if difference <= TOLERANCE[dtype]:
                return dataclasses.replace(model, kv_bytes_per_token=per_token, state_bytes=state)
        raise CheckpointError(
            f"{directory}: the hidden states of {kind} depend on later tokens, or on where its cache was copied (they "
            f"differ by {difference:.1g} of their size): it is an encoder, or its cache does not hold everything"
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def deterministic(self) -> bool:
        """Whether kernels over the head give a row the same bits for every number of rows."""
        return self.head.deterministic

    @property
    def attention_heads(self) -> None:
        """None: the attention is not the engine's."""
        return

    @property
    def weights_per_token(self) -> int:
        """Number of weights that every token is multiplied with, as far as shapes tell; of experts the chosen ones."""
        embedding = self.module.get_input_embeddings().weight
        total = math.prod(self.head.weight.shape)
        for name, parameter in self.base.named_parameters():
            if parameter.ndim > 1 and parameter is not embedding:
                total += parameter.numel() * self._chosen(parameter, name) // _num_experts(parameter, name)
        return total

    @property
    def values_per_token(self) -> int:
        """Number of values of one token that a forward pass holds at once: the outputs of all products of a layer."""
        width = self.head.weight.shape[1]
        widest = max(
            sum(p.shape[-2] * self._chosen(p, name) for name, p in layer.named_parameters() if p.ndim > 1)
            for layer in layers_of(self.module)
        )
        return 6 * width + 2 * widest

    @property
    def base(self) -> Any:
        """The part of the module that computes the hidden states."""
        return base_of(self.module)

    def make_cache(self) -> DynamicCache:
        """Return the empty cache of a path."""
        return make_cache(self.module.config)

    def forward(self, ids_N: Tensor, cache: DynamicCache, *, is_first: bool) -> Tensor:
        """Append N tokens to the path of a cache and return their hidden states, [N, D], over the head's divisor.

        is_first: whether the cache is empty.
        """
        if self.stepwise and not is_first and len(ids_N) > 1:
            return torch.cat([self.forward(id_1, cache, is_first=False) for id_1 in torch.split(ids_N, 1)])
        out = self.base(input_ids=ids_N[None], use_cache=True, **{self.cache_argument: cache})
        return self.head.divide(out.last_hidden_state[0])

    @torch.inference_mode()
    def _try_cache(self) -> tuple[float, int, int]:
        """Compute some tokens at once and over a cache that is forked on the way.

        Returns the largest relative difference of hidden states, and the bytes of the cache per token and per path.
        """
        ids = torch.tensor(PROBE, device=self.device).clamp_max(self.config.vocab_size - 1)
        half = len(ids) // 2
        expected = self.base(input_ids=ids[None], use_cache=False).last_hidden_state[0]
        expected = self.head.divide(expected).float()
        cache = self.make_cache()
        parts = [self.forward(ids[:half], cache, is_first=True)]
        bytes_before = count_bytes(cache)
        forked = fork_cache(cache)
        self.forward(ids[:half], cache, is_first=False)  # other tokens on the first path, before the second goes on
        parts += [self.forward(part, forked, is_first=False) for part in (ids[half:-1], ids[-1:])]
        bytes_after = count_bytes(forked)
        states = torch.cat(parts).float()
        norms = expected.norm(dim=1)
        difference = float(((states - expected).norm(dim=1) / norms.clamp_min(1e-30)).nan_to_num(torch.inf).max())
        per_token = max(0, bytes_after - bytes_before) // (len(ids) - half)
        return difference, per_token, max(0, bytes_after - per_token * len(ids))

    def _chosen(self, parameter: Tensor, name: str) -> int:
        """Return the number of experts in a parameter that compute one token; 1 for any other parameter."""
        if _num_experts(parameter, name) == 1:
            return 1
        config = self.module.config.get_text_config(decoder=True)
        chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1
        return min(int(chosen), _num_experts(parameter, name))


def _num_experts(parameter: Tensor, name: str) -> int:
    """Return the number of experts whose weights a parameter holds; 1 for any other parameter."""
    return parameter.shape[0] if parameter.ndim == 3 and "experts" in name else 1
