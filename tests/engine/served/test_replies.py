"""Answers of a server that are not what OpenAI's API says: each is read rightly, or refused as a `BadReply`."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.stub_server import StubServer
from support.toys import VOCAB, Pair, token_of

from genssd.engine.served.replies import BadReply, Written, read_reply
from genssd.engine.texts.text import Tokenizer

NUM_TOPK = 2
TOP = {"token_id:7": -0.1, "token_id:8": -0.2}
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 258, 259, 100_000, 1 << 70, 10**400, -0.5, 0.5, 2.0, -math.inf, math.inf, math.nan,
    "", "a", "\ud800", "é", "token_id:5", "token_id:-5", "token_id:99999", "token_id:", "token_id:1e3", "stop", [], {},
    [7], [7.0], [True], ["token_id:7"], [None], [[]], {"a": -1.0}, {"token_id:7": -1.0}, {"token_id:7": None},
    {"token_id:7": -0.1, "token_id:8": -0.2}, {"token_id:7": -0.1, "token_id:07": -0.2}, {"token_id:7": math.nan},
]  # fmt: skip
"""Values that a server might write in the place of another one."""


@pytest.fixture(scope="module")
def tokenizer(pair: Pair) -> Tokenizer:
    return Tokenizer(pair.teacher)


@pytest.fixture(scope="module")
def replies(pair: Pair) -> list[dict[str, Any]]:
    """Right answers: with ids, with ids in the names alone, and as text."""
    made = []
    for ids, named in ((True, True), (False, True), (False, False)):
        stub = StubServer(pair.teacher, pair.teacher_model)
        stub.manners.ids, stub.manners.named_ids = ids, named
        fields = {
            "model": "m", "prompt": [60, 61], "n": 2, "max_tokens": 3, "temperature": 1.0, "top_k": -1, "top_p": 1.0,
            "min_p": 0.0, "logprobs": NUM_TOPK, "stop_token_ids": [256], "seed": 4,
        }  # fmt: skip
        made.append(json.loads(json.dumps(stub.complete(fields))))
    return made


def list_places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the places of all values within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in list_places(inner, (*path, key)))]


def check(written: list[Written]) -> None:
    assert len(written) == 2
    for one in written:
        assert all(type(token) is int and 0 <= token < VOCAB for token in one.tokens)
        assert len(one.logprobs) == len(one.tokens) == len(one.topk)
        assert all(isinstance(value, float) and -math.inf < value <= 1e-3 for value in one.logprobs)
        for ids, values in one.topk:
            assert len(set(ids)) == len(ids) == len(values) == NUM_TOPK
            assert all(type(token) is int and 0 <= token < VOCAB for token in ids)
            assert not any(math.isnan(value) for value in values)
            assert values == sorted(values, reverse=True)


def test_right_answers_are_read(replies: list[dict[str, Any]], tokenizer: Tokenizer) -> None:
    for reply in replies[:2]:
        check(read_reply(reply, 2, tokenizer, vocab_size=VOCAB, num_topk=NUM_TOPK))


@given(seed=st.integers(0, 1 << 40), changes=st.integers(1, 4))
def test_any_change_of_an_answer_is_read_or_refused(
    replies: list[dict[str, Any]], tokenizer: Tokenizer, seed: int, changes: int
) -> None:
    generator = random.Random(seed)
    reply = copy.deepcopy(generator.choice(replies))
    for _ in range(changes):
        *path, key = generator.choice(list_places(reply["choices"], ("choices",)))
        place = reply
        for step in path:
            place = place[step]
        if generator.random() < 0.7:
            place[key] = copy.deepcopy(generator.choice(ODD))
        elif path:
            del place[key]
    try:
        written = read_reply(reply, 2, tokenizer, vocab_size=VOCAB, num_topk=NUM_TOPK)
    except BadReply:
        return
    check(written)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_ids", [7.0, 8, 9], "a token id must be an integer, not 7.0"),
        ("token_ids", [True, 8, 9], "a token id must be an integer, not True"),
        ("token_logprobs", [-1.0, 0.5, -1.0], "token 1 has the log-probability 0.5"),
        ("token_logprobs", [-1.0, 10**400, -1.0], "OverflowError"),
        ("top_logprobs", [None, None, None], "AttributeError"),
        ("top_logprobs", [TOP] * 2, "3 tokens came with the most likely ones of 2"),
        ("top_logprobs", [{"token_id:7": -0.1, "token_id:-8": -0.2}] * 3, "token id -8 is outside of the vocabulary"),
        ("top_logprobs", [{"token_id:7": -0.1, "token_id:8": math.nan}] * 3, "log-probability NaN"),
        ("top_logprobs", [{"token_id:7": -0.1, "token_id:07": -0.2}] * 3, "came instead of 2"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_used_are_named(tokenizer: Tokenizer, name: str, value: Any, message: str) -> None:
    logprobs = {"tokens": ["token_id:7"] * 3, "token_logprobs": [-1.0] * 3, "top_logprobs": [TOP] * 3}
    choice = {"index": 0, "text": "abc", "finish_reason": "length", "token_ids": [7, 8, 9], "logprobs": logprobs}
    (choice if name == "token_ids" else logprobs)[name] = value
    with pytest.raises(BadReply, match=message):
        read_reply({"choices": [choice]}, 1, tokenizer, vocab_size=VOCAB, num_topk=NUM_TOPK)


def test_text_that_is_none_is_refused(tokenizer: Tokenizer) -> None:
    """Half of a surrogate pair, which JSON can hold."""
    names = [tokenizer.token_text(token_of("a")), "\ud800"]
    logprobs = {"tokens": names, "token_logprobs": [-1.0, -1.0]}
    choice = {"index": 0, "text": "a\ud800", "finish_reason": "length", "logprobs": logprobs}
    with pytest.raises(BadReply, match="InputError: half of a surrogate pair"):
        read_reply({"choices": [choice]}, 1, tokenizer, vocab_size=VOCAB, num_topk=0)
