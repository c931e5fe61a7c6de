"""The number of threads that commands choose, and that the engine computes with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair

from genssd import Chunk, Engine
from genssd.engine.calls.nodes import Fork
from genssd.engine.common.errors import InputError
from genssd.engine.common.thread_count import MAX_THREADS
from genssd.engine.host import threads
from genssd.engine.host.threads import choose_engine_threads, choose_training_threads, effective_threads
from genssd.engine.models.model import Decoder
from genssd.engine.models.model_head import ModelHead
from genssd.kernels.threads import native_threads, num_threads

MILLION = 1_000_000


@pytest.mark.parametrize(
    ("requested", "cores", "environment", "count", "reason"),
    [
        (None, 2, {}, 2, "2 cores given"),
        (None, 1, {}, 1, "1 core given"),
        (None, 64, {"LOCAL_WORLD_SIZE": "8"}, 64, "64 cores given"),
        (None, 2, {"OMP_NUM_THREADS": "5"}, 5, "OMP_NUM_THREADS"),
        (None, 4, {"OMP_NUM_THREADS": "3,2"}, 3, "OMP_NUM_THREADS"),
        (None, 4, {"OMP_NUM_THREADS": "all"}, 4, "4 cores given"),
        (None, 4, {"OMP_NUM_THREADS": "0"}, 4, "4 cores given"),
        (3, 2, {"OMP_NUM_THREADS": "5"}, 3, "as asked for"),
    ],
)
def test_threads_of_the_engine(
    requested: int | None, cores: int, environment: dict[str, str], count: int, reason: str
) -> None:
    choice = choose_engine_threads(requested, cores=cores, environment=environment)
    assert (choice.count, choice.reason) == (count, reason)


@pytest.mark.parametrize(
    ("requested", "parameters", "cores", "environment", "count"),
    [
        (None, 239_904, 64, {}, 1),
        (None, 5 * MILLION, 64, {}, 3),
        (None, 135 * MILLION, 2, {}, 2),
        (None, 135 * MILLION, 64, {}, 64),
        (None, 135 * MILLION, 64, {"LOCAL_WORLD_SIZE": "8"}, 8),
        (None, 135 * MILLION, 2, {"LOCAL_WORLD_SIZE": "8"}, 1),
        (None, 239_904, 2, {"OMP_NUM_THREADS": "2"}, 2),
        (None, 135 * MILLION, 64, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 1),  # as torchrun sets it
        (4, 239_904, 2, {"OMP_NUM_THREADS": "1"}, 4),
    ],
)
def test_threads_of_a_training(
    requested: int | None, parameters: int, cores: int, environment: dict[str, str], count: int
) -> None:
    assert choose_training_threads(requested, parameters, cores=cores, environment=environment).count == count


@pytest.mark.parametrize(("examples", "count"), [(1, 1), (4, 1), (16, 2), (48, 7), (512, 64)])
def test_a_training_with_more_examples_in_a_forward_pass_takes_more_threads(examples: int, count: int) -> None:
    choice = choose_training_threads(None, 239_904, examples=examples, cores=64, environment={})
    assert choice.count == count


def test_what_is_logged() -> None:
    small = choose_training_threads(None, 239_904, cores=4, environment={})
    assert str(small) == "computing with 1 thread (a model of 239,904 parameters)"
    few = choose_training_threads(None, 239_904, examples=4, cores=4, environment={})
    assert str(few) == "computing with 1 thread (a model of 239,904 parameters, 4 examples in a forward pass)"
    both = choose_training_threads(None, 9 * MILLION, cores=4, environment={"LOCAL_WORLD_SIZE": "2"})
    assert str(both) == "computing with 2 threads (4 cores given, 2 processes)"


@pytest.mark.parametrize("number", [0, -1, MAX_THREADS + 1])
def test_impossible_numbers_are_refused(number: int, tiny_pair: TinyPair) -> None:
    for choose in (choose_engine_threads, lambda n: choose_training_threads(n, MILLION), effective_threads):
        with pytest.raises(InputError, match=rf"threads must be in 1\.\.{MAX_THREADS}, not {number}"):
            choose(number)
    with pytest.raises(InputError, match="threads must be"):
        Engine.from_pretrained(student=tiny_pair.student, threads=number)


def test_by_default_the_engine_follows_torch_within_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 3)
    for number, expected in ((1, 1), (2, 2), (8, 3)):
        torch.set_num_threads(number)
        assert effective_threads(None) == expected
        with native_threads(7):
            assert (num_threads(), effective_threads(None), effective_threads(2)) == (7, 3, 2)
        assert num_threads() == torch.get_num_threads() == number


def use_everything(engine: Engine) -> None:
    """Call every function of an engine that computes."""
    engine.select_expand(["one"], candidates=2, chunk=Chunk(tokens=2, until=None), max_tokens=4, teacher_topk=2)
    engine.generate(["one"], max_tokens=2)
    engine.score(["one", "one"], ["two", "three"])
    engine.local_logprob("one", [5, 6, 7], [(0, 1, 3)])
    list(engine.iter_force("one", [[5, 6, 7]], [[Fork(position=1, token=9)]], max_tokens=5))
    reader = engine.node_reader()
    (states,) = reader.states([5, 6], [[7, 8]], [[1]], "a prompt")
    reader.likeliest(states, 2, "a prompt")
    reader.logprob(states, [[3]], "a prompt")
    two = Chunk(tokens=2, until=None)
    with engine.branch("one") as branch:
        candidates = branch.expand(2, two)
    for candidate in candidates:
        candidate.commit()
        candidate.suspend()  # what they share is computed when they come back
    engine.expand(candidates, 1, two)


def test_native_kernels_get_the_threads_and_torch_gets_one(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the idle threads of torch would occupy the cores that the native kernels compute on."""
    seen: set[tuple[str, int, int]] = set()

    def watch(owner: type, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen.add((name, num_threads(), torch.get_num_threads()))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    watch(Decoder, "forward")
    watch(ModelHead, "logits")
    engine = Engine.from_pretrained(tiny_pair.teacher, tiny_pair.student, memory_bytes=1 << 24, threads=3)
    torch.set_num_threads(2)
    use_everything(engine)
    assert seen == {("forward", 3, 1), ("logits", 3, 1)}
    assert torch.get_num_threads() == 2
    assert engine.threads == 3


@pytest.mark.parametrize(("given", "expected"), [({}, "passive 0"), ({"OMP_WAIT_POLICY": "active"}, "active None")])
def test_the_command_line_lets_idle_threads_sleep(given: dict[str, str], expected: str) -> None:
    """The setting has an effect only before torch is imported."""
    code = (
        "import os, sys; from genssd.cli import main\n"
        "try: main(['nonsense'])\n"
        "except SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ.get('KMP_BLOCKTIME'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, timeout=600)
    assert done.stdout.strip() == f"{expected} False"
