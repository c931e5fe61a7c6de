"""Mutations of files, and what must hold for every one of them: success, or one GenssdError of one line, in time."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st

from genssd.engine.common.errors import GenssdError

MAX_SECONDS = 10.0
"""Seconds of computing that an input may take."""
NUM_INPUTS = int(os.environ.get("GENSSD_FUZZ", "0"))
"""Number of inputs of the fuzz tests of models, rows and templates together, and again of those of runs (test_runs.py);
0: the few that belong to the normal tests."""


SEED = int(os.environ.get("GENSSD_FUZZ_SEED", "0"))
"""Seed of the inputs."""


class HangError(BaseException):
    """An input that took too long; no `except Exception` of the code under test catches it."""


def fuzz_settings(few: int, share: float) -> Callable[[Any], Any]:
    """Give a test its number of inputs: few, or its share of GENSSD_FUZZ. A seed makes the same inputs every time."""
    count = max(1, round(share * NUM_INPUTS)) if NUM_INPUTS else few
    unimportant = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    # the phase that explains a failure traces every line, and the signal of `limited` can stop CPython 3.11 there
    phases = [phase for phase in Phase if phase is not Phase.explain]
    options = settings(
        max_examples=count, deadline=None, suppress_health_check=unimportant, database=None, phases=phases
    )
    return lambda test: seed(SEED)(settings(options, derandomize=False)(test))


@contextmanager
def limited() -> Iterator[None]:
    """Raise HangError in a block that computes for longer than MAX_SECONDS, in all threads together."""

    def stop(*_: object) -> None:
        raise HangError(f"more than {MAX_SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def succeeds_or_refuses(work: Callable[[], object]) -> str | None:
    """Run something; return the message of its GenssdError, None where it succeeds. Anything else fails the test."""
    with limited():
        try:
            work()
        except GenssdError as error:
            message = str(error)
            assert message
            assert len(message) < 2000, f"a message of {len(message)} characters: {message[:300]}"
            assert all(c.isprintable() for c in message), f"not printable, or several lines: {message!r}"
            return message
    return None


def _nest(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 1.5, 0.0, -0.0, 1e-30, 1e308, float("nan"), float("inf"), -float("inf"),
    2**31, 2**31 - 1, 2**32, 2**63, -(2**63), 10**12, 10**40, "", " ", "a", "0", "1", "none", "auto", "\x00", 
    "\x1b[31m", "a\nb", "\u202e\u0301", "\ud800", "\U0001f600", "x" * 5000, "../../etc/passwd", "/dev/zero", "~",
    "<|im_end|>", [], {}, [[]], [None], ["a"], [1, 2], {"a": 1}, {"": None}, {"type": "a"}, _nest(50), _nest(500),
]  # fmt: skip
"""Values of any type and size, in place of any other."""


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in JSON data, few of long lists."""
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())[:40]
    elif isinstance(value, list):
        children = list(enumerate(value))[:8]
    return [path, *(place for key, child in children for place in _places(child, (*path, key)))]


@st.composite
def mutated_json(draw: st.DrawFn, base: Any, names: tuple[str, ...] = ()) -> Any:
    """Draw JSON data that differs from the base in one to three places. names: of fields that may be added."""
    data = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        kinds = ["replace", "delete", "rename", "copy", "add"] if names else ["replace", "delete", "rename", "copy"]
        kind = draw(st.sampled_from(kinds))
        odd = copy.deepcopy(draw(st.sampled_from(ODD_VALUES)))
        if kind == "add" and isinstance(data, dict):
            data[draw(st.sampled_from(names))] = odd
            continue
        places = _places(data)
        path = draw(st.sampled_from(places))
        if not path:
            data = odd if draw(st.integers(0, 9)) == 0 else data
            continue
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        if kind == "replace":
            parent[path[-1]] = odd
        elif kind == "copy":
            other = data
            for key in draw(st.sampled_from(places)):
                other = other[key]
            parent[path[-1]] = copy.deepcopy(other)
        else:
            value = parent.pop(path[-1])
            if kind == "rename" and isinstance(parent, dict):
                parent[draw(st.sampled_from(["", "a", "\x00", f"{path[-1]}s", "type", "x" * 3000]))] = value
    return data


@st.composite
def mutated_bytes(draw: st.DrawFn, base: bytes) -> bytes:
    """Draw bytes that differ from the base by a cut, flipped bits, or inserted bytes."""
    if not base:
        return draw(st.binary(max_size=8))
    kind = draw(st.sampled_from(["cut", "flip", "insert", "double"]))
    place = draw(st.integers(0, min(len(base), 4000) - 1))
    if kind == "cut":
        return base[:place]
    if kind == "flip":
        return base[:place] + bytes([base[place] ^ (1 << draw(st.integers(0, 7)))]) + base[place + 1 :]
    if kind == "insert":
        return base[:place] + draw(st.sampled_from(INSERTED)) + base[place:]
    return base[:place] + base


INSERTED = [
    b"\xef\xbb\xbf",
    b"\x00",
    b"\xff\xfe",
    b"{",
    b"}",
    b"[" * 3000,
    b",",
    b'"',
    b"\\u0000",
    b"NaN",
    b"1e999",
    b"\n",
    b"//",
]


@st.composite
def mutated_file(draw: st.DrawFn, base: Any, names: tuple[str, ...] = ()) -> bytes:
    """Draw the bytes of a JSON file that differs from the base in its values, its keys or its text."""
    if draw(st.integers(0, 5)) == 0:
        return draw(mutated_bytes(json.dumps(base).encode()))
    data = draw(mutated_json(base, names))
    text = json.dumps(data)
    if isinstance(data, dict) and data and draw(st.integers(0, 7)) == 0:  # a key twice
        key = draw(st.sampled_from(list(data)))
        text = "{" + json.dumps(key) + ": " + json.dumps(draw(st.sampled_from(ODD_VALUES))) + ", " + text[1:]
    return text.encode()
