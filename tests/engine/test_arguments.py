"""Arguments of the engine's methods: what the command line would refuse is refused in one line that names it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any, Literal, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from support.toys import Pair

from genssd.engine.calls.nodes import Fork, NodeReader
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.controls import Length
from genssd.engine.criteria.criterion_names import register_criterion
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling

HALF = "a\ud800b"
BAD: dict[Any, tuple[Any, ...]] = {
    int: (1.5, True, "3", None, math.nan, [3]),
    int | None: (1.5, True, "3", math.inf),
    float: ("0.5", True, None, math.nan, math.inf),
    bool: (1, "no", None),
    str: (3, None, b"x", HALF),
    str | None: (3, b"x", HALF),
    Sampling: (0.7, None, {"temperature": 1.0}),
    ReverseSpeculation | None: (True, {}),
    frozenset[int]: (3, "3", [0], {0.5}),
}


def calls(engine: Engine) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every method with arguments that it takes."""
    return {
        "select_expand": (engine.select_expand, (["abc"],)),
        "iter_select_expand": (engine.iter_select_expand, (["abc"],)),
        "generate": (engine.generate, (["abc"],)),
        "iter_generate": (engine.iter_generate, (["abc"],)),
        "iter_force": (engine.iter_force, ("abc", [[1, 2]], [[Fork(position=1, token=5)]])),
        "node_reader": (engine.node_reader, ()),
        "score": (engine.score, (["abc"], ["de"])),
        "local_logprob": (engine.local_logprob, ("abc", [1, 2], [(0, 0, 1)])),
        "mean_activations": (engine.mean_activations, ("abc", [1, 2])),
        "hidden_states": (engine.hidden_states, ("abc", [1, 2])),
        "branch": (engine.branch, ("abc",)),
        "encode_pair": (engine.encode_pair, ("abc",)),
        "expand": (engine.expand, ([], 2)),
        "with_chat": (engine.with_chat, ()),
        "positions": (engine.positions, ("teacher",)),
        "vocabulary": (engine.vocabulary, ("teacher",)),
        "max_sequence_length": (engine.max_sequence_length, ("teacher",)),
        "tokenizer": (engine.tokenizer, ("teacher",)),
        "from_pretrained": (Engine.from_pretrained, ("teacher", "student")),
    }


def bad_values(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return ("Teacher", "", None, 0)
    return BAD.get(hint, ())


def test_every_method_is_called_here(engine: Engine) -> None:
    members = {name: inspect.getattr_static(Engine, name) for name in dir(Engine) if not name.startswith("_")}
    methods = {
        name for name, member in members.items() if inspect.isfunction(member) or isinstance(member, classmethod)
    }
    assert methods == set(calls(engine))


def test_every_argument_is_checked_and_named(engine: Engine) -> None:
    num_checked = 0
    for name, (method, arguments) in calls(engine).items():
        hints = get_type_hints(inspect.unwrap(method))
        for parameter in list(inspect.signature(method).parameters)[len(arguments) :]:
            for value in bad_values(hints[parameter]):
                with pytest.raises(InputError, match=rf"^{parameter} must be ") as error:
                    method(*arguments, **{parameter: value})
                assert "\n" not in str(error.value), name
                num_checked += 1
    assert num_checked > 120
    for method in (engine.positions, engine.vocabulary, engine.max_sequence_length, engine.tokenizer):
        with pytest.raises(InputError, match=r"^model must be one of 'teacher', 'student', not 'judge'"):
            method("judge")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate([HALF]), r"^prompt 0: half of a surrogate pair \(\\ud800 at character 1\) is no text"),
        (lambda e: e.branch([{"role": "user", "content": HALF}]), r"^the prompt: half of a surrogate pair"),
        (lambda e: e.branch([{"role": "user", "content": "x", HALF: 1}]), r"^the prompt: half of a surrogate pair"),
        (lambda e: e.score(["a"], [HALF]), "^response 0: half of a surrogate pair"),
        (lambda e: e.select_expand(["a"], answers=[HALF]), "^the answer of prompt 0 must be text or None"),
        (lambda e: e.select_expand(["a"], answers=[3]), "^the answer of prompt 0 must be text or None, not 3"),
        (lambda e: e.select_expand(["a"], answers="5"), "^answers is a list of answers, not '5'; put a single one"),
        (lambda e: e.select_expand(["a"], answers=["1", "2"]), "^1 prompt but 2 answers"),
        (lambda e: e.iter_generate(["a"], labels="x"), "^labels is a list of names, not 'x'"),
        (lambda e: e.iter_generate(["a"], labels=[3]), r"^labels\[0\] must be text, not 3"),
        (lambda e: e.iter_generate(["a"], labels=["x", "y"]), "^1 prompt but 2 labels"),
        (lambda e: e.generate("abc"), "^prompts is a list of prompts, not 'abc'; put a single one into a list"),
        (lambda e: e.generate({"a": 1}), "^prompts is a list of prompts"),
        (lambda e: e.generate(7), "^prompts is a list of prompts"),
        (lambda e: e.generate([[5, -1]]), "^prompt 0: token id -1 is not in the vocabulary"),
        (lambda e: e.generate([[5, 259]]), "^prompt 0: token id 259 is not in the vocabulary"),
        (lambda e: e.generate([[5, 1.0]]), "^prompt 0: a prompt is a string"),
        (lambda e: e.generate([[5, True]]), "^prompt 0: a prompt is a string"),
        (lambda e: e.score(["a"], "b"), "^responses is a list of responses, not 'b'"),
        (lambda e: e.score(["a"], [[5, 1.0]]), r"^response 0: a token id must be an integer, not 1\.0"),
        (lambda e: e.score(["a"], [[5, True]]), "^response 0: a token id must be an integer, not True"),
        (lambda e: e.score(["a"], [[5, -1]]), "^response 0: token id -1 is outside"),
        (lambda e: e.score(["a"], [7]), "^response 0 is a list of token ids, not 7"),
        (lambda e: e.local_logprob("a", [5, 6], [(0, 0.5, 1)]), r"^a window must be a list of integer values"),
        (lambda e: e.local_logprob("a", [5, 6], 3), "^windows is a list of windows"),
        (lambda e: e.local_logprob("a", [5, 999], [(0, 0, 1)]), "^the response: token id 999 is outside"),
        (lambda e: e.mean_activations("a", [5, 999]), "^the response: token id 999 is outside"),
        (lambda e: e.mean_activations("a", [5, 6], -1), "^start must lie in the response of 2 tokens, not -1"),
        (lambda e: e.mean_activations("a", [5, 6], 0.5), r"^start must be an integer, not 0\.5"),
        (lambda e: e.generate(["a"], seed=None), "^seed must be an integer, not None"),
        (lambda e: e.select_expand(["a"], candidates=2.5), r"^candidates must be an integer, not 2\.5"),
        (lambda e: e.select_expand(["a"], teacher_topk=260), r"^teacher_topk must be in 0\.\.259, not 260"),
        (lambda e: e.select_expand(["a"], {"beam": 2}), "^options must be a SearchOptions"),
        (lambda e: e.branch("a").expand(2.5, 5), r"^n must be an integer, not 2\.5"),
        (lambda e: e.branch("a").expand(2, chunk=-3), "^chunk tokens must be at least 1, not -3"),
        (lambda e: e.expand(e.branch("a"), 2, 5), "^branches must be a list of Branch values"),
        (lambda e: e.expand(["a"], 2, 5), "^branches must be a list of Branch values"),
    ],
)
def test_lists_texts_and_token_ids(engine: Engine, call: Callable[[Engine], object], message: str) -> None:
    before = engine.usage.sampled_tokens
    with pytest.raises(InputError, match=message):
        call(engine)
    assert engine.usage.sampled_tokens == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.states([5], [[6, 7]], [[3]], "x"), "^x: position 3 lies outside of a response of 2 tokens"),
        (lambda r: r.states([5], [[6, 7]], [[-1]], "x"), "^x: a position must be at least 0, not -1"),
        (lambda r: r.states([5], [[6, 7]], [[0.5]], "x"), r"^x: a position must be an integer, not 0\.5"),
        (lambda r: r.states([999], [[6]], [[0]], "x"), "^x: token id 999 is outside"),
        (lambda r: r.states([5], [[-6]], [[0]], "x"), "^x: token id -6 is outside"),
        (lambda r: r.likeliest(torch.zeros(1, 64), 0, "x"), "^k must be at least 1, not 0"),
        (lambda r: r.likeliest(torch.zeros(1, 64), 2, "x", least=math.nan), "^least must be a finite number, not nan"),
        (lambda r: r.logprob(torch.zeros(1, 64), [[-1]], "x"), "^x: token id -1 is outside"),
        (lambda r: r.logprob(torch.zeros(1, 64), [[259]], "x"), "^x: token id 259 is outside"),
    ],
)
def test_nodes_and_tokens_of_a_reader(engine: Engine, call: Callable[[NodeReader], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(engine.node_reader())
    assert engine.pages_in_use[0] == 0


@pytest.mark.parametrize("position", [1.5, "1", None, True])
def test_a_fork_checks_itself(position: Any) -> None:
    with pytest.raises(InputError, match=r"^position must be an integer, not"):
        Fork(position=position, token=5)
    with pytest.raises(InputError, match=r"^token must be an integer, not"):
        Fork(position=1, token=position)


@pytest.mark.parametrize("name", ["a b", "x:y", "0.5*x", "", 3, None])
def test_a_criterion_has_a_name_that_can_be_written(name: Any) -> None:
    with pytest.raises(InputError, match="name"):
        register_criterion(name, Length)
    with pytest.raises(InputError, match="maker must be"):
        register_criterion("of_the_test", 3)  # type: ignore[arg-type]


def test_branches_of_another_engine_are_refused(engine: Engine, pair: Pair) -> None:
    other = pair.engine()
    with pytest.raises(InputError, match=r"^branch 1 belongs to another engine"):
        engine.expand([engine.branch("a"), other.branch("a")], 2, 5)


def test_numbers_and_arrays_of_numpy_are_taken(engine: Engine) -> None:
    prompt = np.array([5, 6, 7])
    expected = engine.generate([[5, 6, 7]], n=2, max_tokens=6, seed=3)
    assert engine.generate([prompt], n=np.int32(2), max_tokens=np.int64(6), seed=np.uint8(3)) == expected
    assert engine.generate([torch.tensor([5, 6, 7]).tolist()], n=2, max_tokens=6, seed=3) == expected
    ids = [8, 9, 10]
    for response in (np.array(ids), tuple(ids)):
        assert torch.equal(engine.score([prompt], [response])[0].logprob, engine.score([[5, 6, 7]], [ids])[0].logprob)
    cold = engine.generate([prompt], max_tokens=6, sampling=Sampling(temperature=0.0))
    assert engine.generate([prompt], max_tokens=6, sampling=Sampling(temperature=1e-30)) == cold


def test_messages_are_short_and_printable(engine: Engine) -> None:
    with pytest.raises(InputError) as error:
        engine.generate("x\n\x1b" * 10_000)
    assert len(str(error.value)) < 300
    assert re.search(r"[\n\x1b]", str(error.value)) is None
