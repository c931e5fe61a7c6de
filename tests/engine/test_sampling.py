"""Random streams: what they depend on, and that different places draw different noise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genssd.engine.common.errors import InputError
from genssd.engine.models.sampling import Sampling, child_stream, noise_key, noise_keys, prompt_stream, uniform

WORDS = st.integers(0, (1 << 64) - 1)


@given(stream=WORDS, position=st.integers(0, 1 << 20))
def test_the_first_child_inherits_the_stream_and_the_others_differ(stream: int, position: int) -> None:
    streams = [child_stream(stream, position, index) for index in range(16)]
    assert streams[0] == stream
    assert len(set(streams)) == 16
    assert all(0 <= s < 1 << 64 for s in streams)


def test_children_at_other_positions_and_of_other_parents_have_other_streams() -> None:
    streams = {
        child_stream(parent, position, index)
        for parent in (prompt_stream(0, [1, 2], 0), prompt_stream(0, [1, 2], 1), prompt_stream(1, [1, 2], 0))
        for position in range(40)
        for index in range(1, 9)
    }
    assert len(streams) == 3 * 40 * 8


@given(stream=WORDS, position=st.integers(0, 1 << 40))
def test_a_key_is_a_signed_64_bit_integer(stream: int, position: int) -> None:
    assert -(1 << 63) <= noise_key(stream, position) < 1 << 63


def test_keys_of_nearby_positions_and_streams_differ() -> None:
    streams = [child_stream(prompt_stream(0, [7], 0), p, i) for p in range(8) for i in range(1, 9)]
    keys = [noise_key(stream, position) for stream in streams for position in range(100)]
    pairs = [(stream, position) for stream in streams for position in range(100)]
    assert noise_keys(*zip(*pairs, strict=True)).tolist() == keys
    assert len(set(keys)) == 64 * 100
    assert min(keys) < 0 < max(keys)


def test_a_prompts_stream_depends_on_seed_ids_and_occurrence() -> None:
    streams = [
        prompt_stream(seed, ids, occurrence)
        for seed in (0, 1, -1, 12)
        for ids in ([1, 2], [2, 1], [12], [1], [1, 2, 0])
        for occurrence in range(4)
    ]
    assert len(set(streams)) == len(streams)
    assert all(0 <= s < 1 << 64 for s in streams)
    assert prompt_stream(3, [1, 2], 5) == prompt_stream(3, (1, 2), 5)
    # digits do not run into each other
    assert prompt_stream(1, [1], 11) != prompt_stream(11, [1], 1)
    assert prompt_stream(0, [1, 23], 0) != prompt_stream(0, [12, 3], 0)


def test_a_prompts_stream_never_changes_between_versions() -> None:
    """A resumed run must draw what the first run drew: these numbers are part of the format of a journal."""
    stream = prompt_stream(0, [1, 2, 3], 0)
    assert stream == 16766019077267934776
    assert child_stream(stream, 4, 2) == 2018607933645884511
    assert noise_key(stream, 5) == -3099583730095624920


@given(stream=WORDS, position=st.integers(0, 1 << 20))
def test_uniform_lies_in_the_unit_interval(stream: int, position: int) -> None:
    assert 0.0 <= uniform(stream, position) < 1.0


def test_uniform_is_uniform_over_streams_and_positions() -> None:
    values = [uniform(child_stream(9, p, i), p) for p in range(100) for i in range(1, 101)]
    tenths = [sum(k / 10 <= v < (k + 1) / 10 for v in values) for k in range(10)]
    statistic = sum((n - 1000) ** 2 / 1000 for n in tenths)
    assert statistic < 33.7  # chi-square with 9 degrees of freedom at p = 1e-4


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.0}, "min_p"),
        ({"min_p": -0.5}, "min_p"),
    ],
)
def test_an_option_out_of_range_is_an_input_error(options: dict[str, float], name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}.*not {next(iter(options.values()))}"):
        Sampling(**options)  # type: ignore[arg-type]
