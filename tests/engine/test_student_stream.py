"""The student's scoring on a stream of its own: which work waits for which, on a model of CUDA streams.

Values are compared with those of a CPU in kernels/triton/test_cuda_paths.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.byte_tokenizers import build, save
from support.fake_cuda import DEVICE, FakeCuda
from support.fake_streams import StreamRace, Streams
from support.toys import Pair, save_checkpoint

from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.side_stream import SideStream

PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 1], [4]]
SEARCH: dict[str, Any] = {
    "chunk": Chunk(tokens=2, until=None), "max_tokens": 6, "candidates": 2, "loop_guard": False, "seed": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    base = tmp_path_factory.mktemp("pair")
    paths: list[Path] = [base / role for role in ("teacher", "student")]
    return Pair(*paths, *(save_checkpoint(path, "qwen3", seed=seed) for seed, path in enumerate(paths)))


def search(pair: Pair, **changes: Any) -> FakeCuda:
    with FakeCuda(computes=False) as device:
        # some prompts decode while others are scored
        engine = pair.engine(device="cuda:0", student_stream=True, max_num_seqs=5)
        selections = engine.select_expand(PROMPTS, **{**SEARCH, **changes})
        assert [len(selection.best.token_ids) for selection in selections] == [6] * len(PROMPTS)
        assert engine.pages_in_use[0] == 0
    return device


@pytest.mark.parametrize(
    "changes",
    [{}, {"beam": 2}, {"criterion": "rationale_difficulty", "answers": ["3", "4", "5", "6"]}, {"criterion": "scas"}],
    ids=["plain", "beam", "answers", "activations"],
)
def test_a_search_has_no_races(changes: dict[str, Any], pair: Pair) -> None:
    """Also where the criterion reads the student on the main stream."""
    assert len(search(pair, **changes).streams.used) > 1


def test_decoding_goes_on_beside_the_scoring(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the host nor the main stream waits for what the student has just been given to do."""
    waits = []
    enter = SideStream.enter

    @contextmanager
    def watch(side: SideStream) -> Iterator[None]:
        main: Any = torch.cuda.current_stream()
        number, before = side._stream.number, side._stream.clock.get(side._stream.number, 0)
        with enter(side):
            yield
        done = side._stream.clock.get(number, 0)
        if done > before:
            waits.append(done in (main.clock.get(number, 0), side._stream._streams.host.get(number, 0)))

    monkeypatch.setattr(SideStream, "enter", watch)
    search(pair)
    assert len(waits) > 4
    assert not any(waits)


@pytest.mark.parametrize(("method", "criterion"), [("follow", "scas"), ("_wait_for_main", "ppl")])
def test_a_missing_wait_is_seen(method: str, criterion: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SideStream, method, lambda *_: None)
    # scores come in only where the host waits for them: others are still computed then
    monkeypatch.setattr(Streams, "arrives", lambda _: False)
    with pytest.raises(StreamRace):
        search(pair, criterion=criterion)


@pytest.mark.parametrize("shared", [True, False])
def test_memory_is_not_handed_on_while_the_side_stream_uses_it(shared: bool) -> None:
    with FakeCuda(computes=False):
        side = SideStream(DEVICE)
        state = torch.zeros(4, device=DEVICE)
        with side.enter():
            state.add_(1)
        if shared:
            side.share(state)
        del state
        with nullcontext() if shared else pytest.raises(StreamRace, match="is freed while stream 1 uses it"):
            torch.zeros(1, device=DEVICE)


def test_a_student_with_another_tokenizer(pair: Pair, tmp_path: Path) -> None:
    foreign = save(tmp_path / "gemma", build("gemma", size=700), seed=2)
    with FakeCuda(computes=False):
        engine = Engine.from_pretrained(
            pair.teacher, foreign, dtype="float32", memory_bytes=1 << 22, device="cuda:0", student_stream=True
        )
        assert all(selection.error is None for selection in engine.select_expand(["a b", "c"], **SEARCH))


def test_a_search_that_is_closed_early_frees_its_pages(pair: Pair) -> None:
    with FakeCuda(computes=False):
        engine = pair.engine(device="cuda:0", student_stream=True)
        iterator = engine.iter_select_expand(PROMPTS, **SEARCH)
        next(iterator)
        iterator.close()  # type: ignore[attr-defined]
        assert engine.pages_in_use[0] == 0


def test_branches_that_a_caller_expands(pair: Pair) -> None:
    with FakeCuda(computes=False):
        engine = pair.engine(device="cuda:0", student_stream=True)
        candidates = engine.branch(PROMPTS[0]).expand(3, Chunk(tokens=2, until=None))
        assert [len(candidate.stats.logprob) for candidate in candidates] == [2, 2, 2]


def test_it_is_refused_where_no_stream_is(pair: Pair) -> None:
    with pytest.raises(InputError, match="student_stream=True needs a student that"):
        pair.engine(student_stream=True)


def test_streams_race_only_where_nothing_waits() -> None:
    streams = Streams()
    main, side = streams.current, streams.make()
    streams.use([1], "a kernel")
    with streams.enter(side), pytest.raises(StreamRace, match="a kernel on stream 1"):
        streams.use([1], "a kernel")
    side.wait_stream(main)
    with streams.enter(side):
        streams.use([1, 2], "a kernel")
    with pytest.raises(StreamRace):
        streams.use([2], "a kernel")
    side.synchronize()
    streams.use([1, 2], "a kernel")
    with pytest.raises(StreamRace, match="memory of stream 1 is freed while stream 0"):
        streams.free(2)
