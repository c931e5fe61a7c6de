"""Loading of models: from hub ids or directories to runners whose caches share one budget."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from genssd.engine.batching import choose_max_batch
from genssd.engine.checkpoint import locate
from genssd.engine.launches import describe_launches
from genssd.engine.memory import choose_dtype
from genssd.engine.model import Decoder
from genssd.engine.pages import PagePool, pages_within
from genssd.engine.requests import check_vocabulary
from genssd.engine.resources import Resources
from genssd.engine.runner import ModelRunner, Role
from genssd.engine.text import Tokenizer
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

    def open_resources(self, budget_bytes: int, max_batch: int | None = None) -> Resources:
        """Give every decoder a cache; together the caches take the budget, and hold the same number of tokens each.

        max_batch: None for the default of the models' sizes and their device.
        """
        decoders = list(self.decoders.values())
        if max_batch is None:
            configs = [decoder.config for decoder in decoders]
            max_batch = choose_max_batch(configs, decoders[0].device, torch.get_num_threads())
        num_pages = pages_within(budget_bytes, decoders)
        pools = {role: PagePool.for_model(decoder, num_pages) for role, decoder in self.decoders.items()}
        page_bytes = sum(pool.page_bytes for pool in pools.values())
        for pool in pools.values():
            pool.page_bytes = page_bytes
        usage = Usage()
        runners = {
            role: ModelRunner(role, self.directories[role], decoder, pools[role], usage)
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
    decoders = {
        role: Decoder.load(path, choose_dtype(path, dtype, device), device, deterministic=deterministic)
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
    if (launches := describe_launches(list(decoders.values()))) is not None:
        logger.info("kernel configurations: %s", launches.description)
    return LoadedModels(directories=directories, decoders=decoders, tokenizers=tokenizers, token_map=token_map)
