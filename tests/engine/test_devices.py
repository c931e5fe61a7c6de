"""Searches on a device without values: nothing mixes its tensors with those of the host, and the host rarely waits.

Each wait is a time in which the device may have nothing to do. Values are compared in
kernels/triton/test_cuda_paths.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.byte_tokenizers import build, save
from support.fake_cuda import CudaTensor, FakeCuda
from support.search_criteria import list_search_criteria
from support.toys import Pair, save_checkpoint

from genssd import Alternation, Relay, generate_two_writers
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine

PROMPTS = [[5, 6, 7], [8, 9]]
SHORT = Chunk(tokens=2, until=None)
SEARCH: dict[str, Any] = {"chunk": SHORT, "max_tokens": 4, "candidates": 2, "loop_guard": False}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    base = tmp_path_factory.mktemp("pair")
    paths: list[Path] = [base / role for role in ("teacher", "student")]
    return Pair(*paths, *(save_checkpoint(path, "qwen3", seed=seed) for seed, path in enumerate(paths)))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another tokenizer, which spells the same bytes."""
    return save(tmp_path_factory.mktemp("foreign") / "gemma", build("gemma", size=700), seed=2)


def open_engine(teacher: Path | list[Path], student: Path) -> Engine:
    return Engine.from_pretrained(teacher, student, dtype="float32", memory_bytes=1 << 22, device="cuda:0")


@pytest.mark.parametrize("criterion", ["ppl", "rsr", "lark"])
def test_reads_of_a_round_do_not_follow_the_candidates(criterion: str, pair: Pair) -> None:
    """Tokens of a step, and statistics of a round, come in as many reads for five candidates as for two."""
    reads = []
    for candidates in (2, 5):
        with FakeCuda(computes=False):
            engine = pair.engine(device="cuda:0")
            before = CudaTensor.reads
            engine.select_expand(PROMPTS, **{**SEARCH, "candidates": candidates}, criterion=criterion)
            reads.append(CudaTensor.reads - before)
    assert reads[0] == reads[1]
    assert 0 < reads[0] < 30


def test_every_criterion_judges(pair: Pair) -> None:
    with FakeCuda(computes=False):
        engine = pair.engine(device="cuda:0")
        for name in list_search_criteria():
            selections = engine.select_expand(PROMPTS[:1], **SEARCH, criterion=name, answers=["3"], beam=2)
            assert selections[0].error is None, name


@pytest.mark.parametrize(
    "changes", [{"drop_teacher_after": 2}, {"on_unlearnable": "ask_teacher", "threshold": 0.5}], ids=["all", "asked"]
)
def test_several_teachers_write(changes: dict[str, Any], pair: Pair) -> None:
    with FakeCuda(computes=False):
        engine = open_engine([pair.teacher, pair.student], pair.student)
        selections = engine.select_expand(PROMPTS, **SEARCH, **changes)
        assert all(len(selection.teachers) == 2 and selection.error is None for selection in selections)


def test_a_student_with_another_tokenizer_reads(pair: Pair, foreign: Path) -> None:
    with FakeCuda(computes=False):
        selections = open_engine(pair.teacher, foreign).select_expand(["a b", "c"], **SEARCH)
        assert all(selection.error is None for selection in selections)


METHODS: dict[str, Callable[[], Alternation | Relay]] = {
    "alternate": lambda: Alternation(chunk=SHORT),
    "relay": lambda: Relay(threshold=0.0, window=1, teacher="chunk", chunk=SHORT),
}


@pytest.mark.parametrize("name", METHODS)
def test_two_models_write_in_turns(name: str, pair: Pair) -> None:
    with FakeCuda(computes=False):
        written = generate_two_writers(pair.engine(device="cuda:0"), PROMPTS, METHODS[name](), max_tokens=4)
        assert [len(completion.token_ids) for (completion,) in written] == [4, 4]
