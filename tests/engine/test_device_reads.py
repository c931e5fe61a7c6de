"""How often the host waits for a device in a search: each wait is a time in which the device may have nothing to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.fake_cuda import CudaTensor, FakeCuda
from support.toys import Pair, save_checkpoint

from genssd.engine.chunk import Chunk


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    base = tmp_path_factory.mktemp("pair")
    paths: list[Path] = [base / role for role in ("teacher", "student")]
    return Pair(*paths, *(save_checkpoint(path, "qwen3", seed=seed) for seed, path in enumerate(paths)))


@pytest.mark.parametrize("criterion", ["ppl", "rsr", "lark"])
def test_reads_of_a_round_do_not_follow_the_candidates(criterion: str, pair: Pair) -> None:
    """Tokens of a step, and statistics of a round, come in as many reads for five candidates as for two."""
    reads = []
    for candidates in (2, 5):
        with FakeCuda(computes=False):
            engine = pair.engine(device="cuda:0")
            before = CudaTensor.reads
            engine.select_expand(
                [[5, 6, 7], [8, 9]], candidates=candidates, chunk=Chunk(tokens=2, until=None), max_tokens=4,
                criterion=criterion, loop_guard=False,
            )  # fmt: skip
            reads.append(CudaTensor.reads - before)
    assert reads[0] == reads[1]
    assert 0 < reads[0] < 30
