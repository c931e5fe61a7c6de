"""On the CPU a trajectory has the same bits whatever company it is computed in: alone, among 64, on any threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.toys import ENDINGS, VOCAB, edit_json, save_checkpoint

from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling
from genssd.engine.search.selection import Selection
from genssd.engine.setup.memory import DTYPES
from genssd.kernels.logprob import STATISTICS

WIDE = {"hidden_size": 384, "intermediate_size": 640, "num_attention_heads": 6, "head_dim": 64, "scale": 3.0}
"""Wide enough for BLAS libraries to change the order of a sum with the number of rows."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("wide")
    for seed, (role, kind) in enumerate((("teacher", "qwen3"), ("student", "llama"))):
        save_checkpoint(root / role, kind, seed=seed, **WIDE)
        for file in ("config.json", "generation_config.json"):
            edit_json(root / role / file, eos_token_id=ENDINGS)
    return root / "teacher", root / "student"


@pytest.fixture(params=DTYPES)
def engine(models: tuple[Path, Path], request: pytest.FixtureRequest) -> Callable[[], Engine]:
    return lambda: Engine.from_pretrained(*models, dtype=request.param, memory_bytes=96 << 20)


def prompts(count: int) -> list[list[int]]:
    """Half of them begin alike."""
    generator = torch.Generator().manual_seed(5)
    stem = torch.randint(0, VOCAB - 3, (30,), generator=generator).tolist()
    tails = [torch.randint(0, VOCAB - 3, (1 + i % 9,), generator=generator).tolist() for i in range(count)]
    return [stem + tail if i % 2 else tail for i, tail in enumerate(tails)]


def search(engine: Engine, given: Sequence[list[int]]) -> list[Selection]:
    return engine.select_expand(
        given, candidates=2, chunk=Chunk(tokens=5, until=None), max_tokens=15, sampling=Sampling(top_p=0.95), seed=3
    )


def assert_same_bits(actual: Selection, reference: Selection) -> None:
    assert len(actual.tree) == len(reference.tree)
    for one, other in zip(actual.tree, reference.tree, strict=True):
        assert (one.trace, one.token_ids, one.verdict, one.score) == (
            other.trace, other.token_ids, other.verdict, other.score,
        )  # fmt: skip
        assert torch.equal(one.teacher_logprob, other.teacher_logprob)
        for name in STATISTICS:
            assert torch.equal(getattr(one.stats, name), getattr(other.stats, name)), name


def test_a_trajectory_alone_has_the_bits_of_one_among_64(engine: Callable[[], Engine]) -> None:
    given = prompts(64)
    torch.set_num_threads(2)
    together = search(engine(), given)
    torch.set_num_threads(1)
    alone = engine()
    for index in (0, 1, 7, 31, 62, 63):
        (single,) = search(alone, [given[index]])
        assert_same_bits(single, together[index])


def test_a_score_alone_has_the_bits_of_one_among_64(engine: Callable[[], Engine]) -> None:
    given = prompts(64)
    responses = [[*tail[::-1], 3, 1, 4] for tail in given]
    actual = engine()
    together = actual.score(given, responses)
    for index in (0, 5, 33, 63):
        (single,) = actual.score([given[index]], [responses[index]])
        for name in STATISTICS:
            assert torch.equal(getattr(single, name), getattr(together[index], name)), name


@torch.inference_mode()
def test_a_warm_prefix_has_the_bits_of_a_cold_one(
    engine: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a prefix was in the cache, how it came there, and in how many pieces: nothing of it shows."""
    monkeypatch.setattr("genssd.engine.models.runner.MAX_ROWS", 64)
    runner = engine()._resources.runners["student"]
    ids = torch.randint(0, VOCAB, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    (cold,) = runner.extend([runner.tree.root()], [ids])
    for cut in (1, 16, 33, 100, 149):
        prefix = runner.tree.root()
        (head,) = runner.extend([prefix], [ids[:cut]])
        tail, other = runner.extend([runner.tree.fork(prefix), runner.tree.fork(prefix)], [ids[cut:], ids[:5]])
        assert torch.equal(torch.cat((head, tail)), cold)
        assert len(other) == 5
    step_by_step = runner.tree.root()
    states = [runner.extend([step_by_step], [[token]])[0] for token in ids[:40]]
    assert torch.equal(torch.cat(states), cold[:40])
