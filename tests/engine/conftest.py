"""A pair of small random models, and engines over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.toys import ENDINGS, VOCAB, Pair, edit_json, save_checkpoint

from genssd.engine.engine import Engine
from genssd.engine.texts.chat_options import ChatOptions
from genssd.engine.texts.text import Tokenizer


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("pair")
    models = {}
    for seed, role in enumerate(("teacher", "student")):
        models[role] = save_checkpoint(root / role, seed=seed, scale=12.0)
        for file in ("config.json", "generation_config.json"):
            edit_json(root / role / file, eos_token_id=ENDINGS)
    return Pair(root / "teacher", root / "student", models["teacher"], models["student"])


@pytest.fixture(scope="session")
def engines() -> list[Engine]:
    """The engine that tests share, once one asked for it."""
    return []


@pytest.fixture
def engine(pair: Pair, engines: list[Engine]) -> Iterator[Engine]:
    """One engine for all tests that do not fill its cache; a test that leaves pages behind fails and loses it."""
    if not engines:
        engines.append(pair.engine())
    yield engines[0]
    if engines[0].pages_in_use[0]:
        engines.clear()
        pytest.fail("pages leaked")


@pytest.fixture(scope="session")
def random_prompts() -> Callable[[int, int], list[list[int]]]:
    def make(count: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
        return [torch.randint(0, VOCAB - 3, (n,), generator=generator).tolist() for n in lengths]

    return make


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """Return the tokenizer of a tiny checkpoint with another chat template, or none; options: of `ChatOptions`."""
    directory = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(directory)

    def load(template: str | None, **options: Any) -> Tokenizer:
        tokenizer = Tokenizer(directory)
        tokenizer.hf.chat_template = template
        return tokenizer.with_chat(ChatOptions(**options))

    return load
