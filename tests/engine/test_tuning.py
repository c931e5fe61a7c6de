"""The choice of winners from times, without a GPU: the timer and the kernels are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.toys import Pair
from torch import Tensor

from genssd.engine.models import model_head
from genssd.engine.models.launches import LaunchRecord, describe_launches
from genssd.engine.models.sampling import Sampling
from genssd.engine.models.tuning import VARIES, Timing, list_jobs, measure, select_winners, tune
from genssd.kernels import tune_file, tuned
from genssd.kernels.tune_file import Configuration, Problem
from genssd.kernels.tuned import find_disagreement

PROBLEM = Problem(operator="score", dtype="bfloat16", shape=(1000, 64))


def values(block_v: int, stages: int = 1, *, splits: int = 132, library: bool = False) -> Configuration:
    return {"block_v": block_v, "num_stages": stages, "splits": splits, "library": library}


def timings(table: Mapping[tuple[int, int], Sequence[float]], **options: Any) -> list[Timing]:
    """Times by (block_v, stages), one per class; 0 where the candidate is not timed."""
    return [
        Timing(values=values(*key), row_class=row_class, seconds=(seconds,), **options)
        for key, row in table.items()
        for row_class, seconds in enumerate(row)
        if seconds
    ]


def test_the_fastest_of_every_class_wins_and_equal_bits_are_cheapest_together() -> None:
    table = {(256, 5): [311, 340, 0, 0], (256, 4): [0, 336, 493, 15.2e3], (128, 4): [301, 0, 486, 16.3e3],
             (128, 8): [0, 345, 0, 0], (256, 3): [0, 355, 509, 14.8e3]}  # fmt: skip
    entry = select_winners("score", 4, timings(table))
    assert entry is not None
    assert entry.fastest == (values(128, 4), values(256, 4), values(128, 4), values(256, 3))
    assert entry.microseconds == (301e6, 336e6, 486e6, 14.8e9)
    # together, blocks of 256 lose 3 and 1 percent, blocks of 128 lose 3 and 10
    assert entry.deterministic == (values(256, 5), values(256, 4), values(256, 4), values(256, 3))
    assert find_disagreement("score", entry.deterministic) is None


def test_splits_and_measured_bits_divide_the_groups() -> None:
    rows = [
        Timing(values=values(256, 1), row_class=0, seconds=(1.0,), digest="a"),
        Timing(values=values(256, 2), row_class=1, seconds=(1.0,), digest="b"),
        Timing(values=values(256, 3), row_class=1, seconds=(9.0,), digest="a"),
        Timing(values=values(256, 4, splits=264), row_class=1, seconds=(2.0,), digest="a"),
    ]
    entry = select_winners("score", 2, rows)
    assert entry is not None
    assert entry.fastest[:2] == (values(256, 1), values(256, 2))
    assert entry.deterministic is not None
    assert entry.deterministic[:2] == (values(256, 1), values(256, 3))


def test_neither_varying_bits_nor_the_library_are_deterministic() -> None:
    for candidate, digest in ((values(256), VARIES), (values(256, library=True), "a")):
        rows = [Timing(values=candidate, row_class=c, seconds=(1.0,), digest=digest) for c in range(4)]
        entry = select_winners("score", 4, rows)
        assert entry is not None
        assert entry.fastest == (candidate,) * 4
        assert entry.deterministic is None


def test_a_class_weighs_its_samples_alike() -> None:
    rows = [
        Timing(values=values(1), row_class=0, seconds=(1.0, 100.0)),
        Timing(values=values(2), row_class=0, seconds=(1.5, 80.0)),
    ]
    entry = select_winners("attention", 1, rows)
    assert entry is not None
    assert entry.fastest == (values(1),) * 4 == entry.deterministic


def test_a_class_without_a_timing_leaves_no_winner() -> None:
    assert select_winners("score", 4, timings({(256, 1): [1, 1, 1, 0]})) is None


class Made:
    """A workload of one output that counts rows; `wrong` and `failing` name candidates by their block_v."""

    operator: tune_file.Operator = "score"
    problem = PROBLEM
    samples = ((2, 8), (20,))

    def __init__(self, wrong: Sequence[int] = (), failing: Sequence[int] = ()) -> None:
        self._wrong, self._failing = wrong, failing

    def make_small(self) -> Made:
        return self

    def shipped(self, row_class: int) -> Configuration:
        return values(32)

    def candidates(self, row_class: int) -> list[Configuration]:
        return [values(32), values(64), values(128)]

    def make_run(self, candidate: Configuration, sample: int, first: int = 0) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            if candidate["block_v"] in self._failing:
                raise RuntimeError("out of shared memory\nwith details")
            rows = torch.arange(first, first + sample).double()
            return (rows + (candidate["block_v"] in self._wrong),)

        return run

    def check(self, outputs: Sequence[Tensor], sample: int) -> None:
        if not torch.equal(outputs[0], torch.arange(sample).double()):
            raise AssertionError  # as some libraries do, without a word


def test_candidates_that_are_wrong_or_fail_are_left_out_in_one_line_each() -> None:
    lines: list[str] = []
    timed: list[float] = []

    def timer(run: Callable[[], object], is_long: bool) -> float:
        timed.append(1.0)
        return 1.0

    result = tune(Made(wrong=[64], failing=[128]), timer=timer, is_over=lambda: False, report=lines.append)
    assert result is not None
    assert result.entry.fastest == (values(32),) * 4
    assert len(timed) == 3
    assert [line.split("}: ")[1] for line in lines] == [
        "AssertionError: ", "RuntimeError: out of shared memory",
    ] * 2  # fmt: skip
    assert result.describe().startswith("score 1000 x 64 bfloat16: 1..64: 1000000 us (shipped 1000000)")


def test_when_the_time_is_over_the_shipped_ones_are_still_timed() -> None:
    result = tune(Made(), timer=lambda run, is_long: 1.0, is_over=lambda: True, report=lambda line: None)
    assert result is not None
    assert result.entry.fastest == (values(32),) * 4
    assert result.shipped == (1.0, 1.0)


def test_nothing_is_kept_where_nothing_runs() -> None:
    lines: list[str] = []
    made = Made(failing=[32, 64, 128])
    assert tune(made, timer=lambda run, is_long: 1.0, is_over=lambda: False, report=lines.append) is None
    assert len(lines) == 6


def test_bits_that_differ_alone_are_measured() -> None:
    class Batched(Made):
        def make_run(self, candidate: Configuration, sample: int, first: int = 0) -> Callable[[], tuple[Tensor, ...]]:
            rows = torch.arange(first, first + sample).double()
            return lambda: (rows + 1e-9 * (sample == 1),)

    class Sized(Made):
        samples = ((16, 40), (20,))

        def make_run(self, candidate: Configuration, sample: int, first: int = 0) -> Callable[[], tuple[Tensor, ...]]:
            rows = torch.arange(first, first + sample).double()
            return lambda: (rows + 1e-9 * (sample == 40),)

        def check(self, outputs: Sequence[Tensor], sample: int) -> None:
            pass

    for workload in (Batched(), Sized()):
        assert measure(workload, 0, values(32), lambda run, is_long: 1.0).digest == VARIES


def test_every_candidate_is_compiled_once() -> None:
    jobs = list_jobs([Made(), Made()])
    assert [job[1] for job in jobs] == [values(32), values(64), values(128)]


def test_on_a_cpu_there_is_nothing_to_describe(engine: Any) -> None:
    assert engine.launches is None
    assert describe_launches([runner.decoder for runner in engine._resources.runners.values()]) is None


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """A function that returns a decoder which claims to be on a GPU of a name and compute capability."""
    pytest.importorskip("triton")
    monkeypatch.setenv("GENSSD_TUNE_FILE", str(tmp_path / "tune.json"))

    def make(name: str, major: int, minor: int = 0, *, deterministic: bool = True) -> Any:
        properties = SimpleNamespace(name=name, major=major, minor=minor, multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        tuned.card_of.cache_clear()
        tuned.forget()
        return SimpleNamespace(
            head=SimpleNamespace(weight=torch.empty(1000, 64, device="meta")),
            attention_heads=(4, 2, 128),
            device=torch.device("cuda", 0),
            dtype=torch.bfloat16,
            deterministic=deterministic,
        )

    yield make
    tuned.card_of.cache_clear()
    tuned.forget()


def test_where_the_configurations_come_from(on_card: Callable[..., Any]) -> None:
    records = [
        describe_launches([on_card(*card)])
        for card in (("H100", 9), ("H200", 9), ("A100", 8), ("L40", 8, 9), ("B200", 10))
    ]
    assert [record.source for record in records if record is not None] == [
        "shipped for sm_90", "shipped for sm_90", "shipped for sm_80", "generic", "generic",
    ]  # fmt: skip
    h100, h200, a100, _, _ = (record.digest for record in records if record is not None)
    assert h100 == h200 != a100
    fastest = describe_launches([on_card("H100", 9, deterministic=False)])
    assert fastest is not None
    assert fastest.digest != h100
    assert fastest.description == "shipped for sm_90, the fastest for every number of rows"


def test_a_tune_file_changes_source_and_digest(on_card: Callable[..., Any], tmp_path: Path) -> None:
    from genssd.kernels.head_triton import HOPPER_SOME, HeadConfiguration

    decoder = on_card("H200", 9)
    shipped = describe_launches([decoder])
    best = HeadConfiguration(tiles=HOPPER_SOME, group=8).values()
    problem = Problem(operator="score", dtype="bfloat16", shape=(1000, 64))
    entry = tune_file.Entry(deterministic=(best,) * 4, fastest=(best,) * 4)
    tune_file.add_entries(tmp_path / "tune.json", tuned.card_of(decoder.device), {problem: entry})
    tuned.forget()
    partly = describe_launches([decoder])
    assert shipped is not None
    assert partly is not None
    assert partly.source == "partly tuned for H200"
    assert partly.digest != shipped.digest


def test_the_engine_logs_one_line(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = LaunchRecord(source="tuned for NVIDIA H200", deterministic=True, digest="aa")
    monkeypatch.setattr("genssd.engine.setup.loading.describe_launches", lambda decoders: record)
    caplog.set_level("INFO", logger="genssd")
    pair.engine()
    assert [r.message for r in caplog.records if r.name.startswith("genssd")] == [
        "kernel configurations: tuned for NVIDIA H200, deterministic"
    ]


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_mode_reaches_the_kernels(pair: Pair, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring and drawing run in the mode that the engine was made with."""
    seen: set[tuple[str, bool]] = set()
    for name in ("linear_logprob", "linear_sample"):
        path = f"genssd.engine.models.model_head.{name}"
        operator = getattr(model_head, name)

        def spy(*inputs: Any, _name: str = name, _operator: Any = operator, **options: Any) -> Any:
            seen.add((_name, tuned.is_deterministic()))
            return _operator(*inputs, **options)

        monkeypatch.setattr(path, spy)
    engine = pair.engine(deterministic=deterministic)
    engine.select_expand([[1, 2, 3]], candidates=2, max_tokens=4, sampling=Sampling(top_p=1.0))
    assert seen == {("linear_logprob", deterministic), ("linear_sample", deterministic)}
    assert tuned.is_deterministic()
