"""Loading of models: from hub ids or directories to runners whose caches share one budget."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from genssd.engine.batching import choose_max_batch
from genssd.engine.checkpoint import locate
from genssd.engine.config import ModelConfig
from genssd.engine.launches import describe_launches
from genssd.engine.memory import cache_budget, check_weights_fit, choose_dtype, describe_float32
from genssd.engine.model import Decoder
from genssd.engine.pages import PagePool, pages_within
from genssd.engine.requests import check_vocabulary
from genssd.engine.resources import Resources
from genssd.engine.runner import MAX_ROWS, ModelRunner, Role
from genssd.engine.text import Tokenizer
from genssd.engine.threads import effective_threads
from genssd.engine.token_map import TokenMap, match_tokenizers
from genssd.engine.usage import Usage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModels:
    """The models of one engine, by role, and how the student reads the teacher's tokens."""

    directories: dict[Role, Path]
    decoders: dict[Role, Decoder]
    tokenizers: dict[Role, Tokenizer]
    token_map: TokenMap = field(default_factory=TokenMap)

    @staticmethod
    def of_one(role: Role, decoder: Decoder, tokenizer: Tokenizer) -> LoadedModels:
        """Return one model that is in memory already."""
        return LoadedModels(
            directories={role: tokenizer.directory}, decoders={role: decoder}, tokenizers={role: tokenizer}
        )

    def open_resources(
        self, memory_bytes: int | None, free_fraction: float, max_batch: int | None = None, threads: int | None = None
    ) -> Resources:
        """Give every decoder a cache; all hold the same number of tokens.

        memory_bytes: size of all caches together; None takes a fraction of the free memory (`cache_budget`).
        max_batch: maximum number of candidates decoded at once; None for the default (`choose_max_batch`). threads:
        number of threads that compute; None for the default of `threads.effective_threads`.
        """
        decoders = list(self.decoders.values())
        device = decoders[0].device
        if max_batch is None:
            configs = [decoder.config for decoder in decoders]
            max_batch = choose_max_batch(configs, device, effective_threads(threads))
        working = max(_working_bytes(decoder, max_batch) for decoder in decoders)
        budget = cache_budget(device, memory_bytes, free_fraction, working_bytes=working)
        num_pages = pages_within(budget, decoders)
        pools = {role: PagePool.for_model(decoder, num_pages) for role, decoder in self.decoders.items()}
        page_bytes = sum(pool.page_bytes for pool in pools.values())
        for pool in pools.values():
            pool.page_bytes = page_bytes
        usage = Usage()
        runners = {
            role: ModelRunner(role, self.directories[role], decoder, pools[role], usage=usage, threads=threads)
            for role, decoder in self.decoders.items()
        }
        return Resources(
            runners=runners, tokenizers=self.tokenizers, max_batch=max_batch, token_map=self.token_map, usage=usage
        )


def load_models(
    teacher: str | Path | None, student: str | Path | None, dtype: str, device: torch.device, *, deterministic: bool
) -> LoadedModels:
    """Load models and tokenizers from hub ids or local directories.

    deterministic: whether kernels over the heads must give a row the same bits for every number of rows. Logs a warning
    that lists added tokens which differ. Raises CheckpointError on a directory that cannot be used, InputError on
    models whose tokenizers differ in more than added tokens.
    """
    names: dict[Role, str | Path | None] = {"teacher": teacher, "student": student}
    directories = {role: locate(name) for role, name in names.items() if name is not None}
    for path in directories.values():
        ModelConfig.load(path)  # what is no model's directory is refused as such, before its weights are looked for
    dtypes = {role: choose_dtype(path, dtype, device) for role, path in directories.items()}
    check_weights_fit(directories, dtypes, device)
    decoders = {
        role: Decoder.load(path, dtypes[role], device, deterministic=deterministic)
        for role, path in directories.items()
    }
    tokenizers = {role: Tokenizer(path) for role, path in directories.items()}
    for role, decoder in decoders.items():
        check_vocabulary(tokenizers[role], decoder)
    token_map = TokenMap()
    if len(tokenizers) == 2:
        names_in_messages = f"teacher {teacher}", f"student {student}"
        token_map = match_tokenizers(tokenizers["teacher"], tokenizers["student"], *names_in_messages)
    if not token_map.is_identity:
        logger.warning("%s", token_map.describe())
    if dtype == "auto" and (line := describe_float32(dtypes, device)) is not None:
        logger.info("%s", line)
    if (launches := describe_launches(list(decoders.values()))) is not None:
        logger.info("kernel configurations: %s", launches.description)
    return LoadedModels(directories=directories, decoders=decoders, tokenizers=tokenizers, token_map=token_map)


def _working_bytes(decoder: Decoder, max_batch: int) -> int:
    """Return the memory of the largest forward pass of a model, and of the logits of a decoding batch with copies."""
    c = decoder.config
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    feed = c.intermediate_size
    if c.experts is not None:
        feed = max(feed, c.experts.per_token * (c.experts.intermediate_size + c.hidden_size))
    values = 6 * c.hidden_size + heads + 3 * feed  # of one token: states, norms, heads, feed-forward
    return MAX_ROWS * values * decoder.dtype.itemsize + 3 * 4 * max_batch * c.vocab_size
