"""A server that fails, dies, is slow, limits the rate, or is another one than before: what is waited out, and said."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import MODELS
from support.stub_server import Manners, StubServer
from support.toys import Pair
from transformers import AutoModelForCausalLM

from genssd import Engine
from genssd.engine.checkpoints.address import is_url, parse_url
from genssd.engine.common.errors import CheckpointError, GenssdError, InputError, ServerError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.served import client as client_module
from genssd.engine.served.connections import Answer
from genssd.engine.served.options import ServerOptions

PROMPTS = [[60, 61, 62], [70, 5, 6, 7], [9, 8, 7, 6]]
SEARCH: Any = {"candidates": 2, "chunk": Chunk(tokens=2, until="a", limit=4), "max_tokens": 8}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(client_module, "LONGEST_WAIT", 0.1)
    for name in ("GENSSD_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stub(pair: Pair) -> Iterator[StubServer]:
    with StubServer(pair.teacher, pair.teacher_model).running() as server:
        yield server


@pytest.fixture(scope="module")
def steady(pair: Pair) -> Iterator[tuple[StubServer, Engine, Engine, list[Any]]]:
    """A server that stays, an engine over it, one that asks for one thing after the other, and the responses."""
    patience = 120.0  # which of the requests meet a fault is chance, and one may meet most of them
    with StubServer(pair.teacher, pair.teacher_model).running() as server:
        engine = connect(pair, server, patience=patience)
        yield server, engine, connect(pair, server, in_flight=1, patience=patience), responses(engine)


def connect(pair: Pair, stub: StubServer, **options: Any) -> Engine:
    return Engine.from_pretrained(
        stub.url,
        pair.student,
        dtype="float32",
        memory_bytes=1 << 22,
        teacher_tokenizer=pair.teacher,
        server=ServerOptions(**{"timeout": 5.0, "patience": 5.0, **options}),
    )


def responses(engine: Engine) -> list[Any]:
    return [(s.error, s.trajectories and s.best.token_ids) for s in engine.select_expand(PROMPTS, **SEARCH)]


@pytest.mark.parametrize("fault", ["500", "502", "503", "408", "429", "429:1", "refuse", "cut", "torn", "abort"])
def test_faults_are_waited_out_and_change_nothing(
    steady: tuple[StubServer, Engine, Engine, list[Any]], fault: str
) -> None:
    stub, engine, _, expected = steady
    assert engine.server is not None
    before = engine.server.repeats
    stub.faults.extend([fault, "", *[fault] * 12])
    started = time.monotonic()
    assert responses(engine) == expected
    assert not stub.faults
    assert engine.server.repeats > before
    assert time.monotonic() - started >= (1.0 if fault == "429:1" else 0.0)
    assert engine.pages_in_use[0] == 0


def test_a_silent_server_is_asked_again_after_the_timeout(pair: Pair, stub: StubServer) -> None:
    engine = connect(pair, stub, timeout=1.5)
    expected = responses(engine)
    stub.faults.append("silent:3")
    assert responses(engine) == expected


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", r"failed 8 times, last with status 500, fault 500"),
        ("400", r"status 400, fault 400"),
        ("nan", r"token \d has the log-probability nan"),
        ("none", r"token 0 has the log-probability None"),
        ("fewer", r"1 completion came instead of 2"),
        ("foreign", r"token id 100000 is not in the tokenizer .*give teacher_tokenizer"),
        ("form", r"2 tokens came with 1 log-probabilities"),
        ("empty", r"a completion is empty"),
    ],
)
def test_what_a_server_never_answers_rightly_fails_one_prompt(
    steady: tuple[StubServer, Engine, Engine, list[Any]], fault: str, message: str
) -> None:
    stub, _, engine, _ = steady
    stub.faults.extend([fault] * (8 if fault == "500" else 1))
    failed, *others = engine.iter_select_expand(PROMPTS, **SEARCH)
    assert failed.error is not None
    assert stub.url in failed.error
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(failed.error)
    assert [selection.error for selection in others] == [None, None]
    assert engine.pages_in_use[0] == 0
    stub.faults.extend([fault] * (8 if fault == "500" else 1))
    first, *rest = engine.iter_generate(PROMPTS, n=2, max_tokens=2)
    assert first.error is not None
    assert all(outcome.error is None for outcome in rest)


def test_a_server_that_comes_back_goes_on(pair: Pair, stub: StubServer) -> None:
    engine = connect(pair, stub)
    expected = responses(engine)
    outcomes = engine.iter_select_expand(PROMPTS, **SEARCH)
    found = {}
    for number, selection in enumerate(outcomes):
        found[selection.index] = (selection.error, selection.best.token_ids)
        if number < 2:
            stub.kill()
            stub.start()
    assert [found[i] for i in range(len(PROMPTS))] == expected


def test_a_server_that_stays_away_ends_the_run_after_its_patience(pair: Pair, stub: StubServer) -> None:
    engine = connect(pair, stub, patience=0.3)
    stub.kill()
    with pytest.raises(ServerError, match=r"has not answered for 0.3 seconds \(.*refused\); start it again and go on"):
        responses(engine)
    assert engine.pages_in_use[0] == 0
    stub.start()
    assert all(error is None for error, _ in responses(engine))


def test_another_model_after_a_restart_is_refused(pair: Pair, stub: StubServer) -> None:
    engine = connect(pair, stub)
    stub.kill()
    stub.manners.positions = 256
    stub.start()
    with pytest.raises(ServerError, match=r"served 'tiny', 512 positions before and now serves 'tiny', 256 positions"):
        responses(engine)
    stub.kill()
    stub.manners.positions, stub.manners.name = 512, "other"
    stub.start()
    with pytest.raises(ServerError, match=r"before and now serves 'other'"):
        responses(engine)


@pytest.mark.parametrize("seconds", ["3600", "9" * 400])
def test_a_wait_that_is_longer_than_the_patience_is_refused_at_once(pair: Pair, stub: StubServer, seconds: str) -> None:
    engine = connect(pair, stub)
    stub.faults.append(f"429:{seconds}")
    with pytest.raises(ServerError, match="has not answered for 5 seconds"):
        responses(engine)
    assert engine._resources.served is not None
    assert engine._resources.served.client._held_until == 0.0, "other requests would wait for it"


def test_a_message_of_any_depth_is_shown() -> None:
    answer = Answer(status=400, headers={}, body=b'{"error":' * 100_000)
    assert '{"error":{"error":' in answer.message


def test_a_server_that_is_not_there_is_refused_at_once(pair: Pair) -> None:
    stub = StubServer(pair.teacher, pair.teacher_model, port=1)
    with pytest.raises(ServerError, match=r"the server http://127.0.0.1:1/v1 is not there .*: start it, or correct"):
        connect(pair, stub, patience=60.0)


@pytest.mark.parametrize(
    ("manners", "message"),
    [
        (Manners(after_temperature=True), r"--logprobs-mode raw_logprobs"),
        (Manners(logprobs=False), r"it has no log-probabilities"),
        (Manners(takes_ids=False), r"cannot be the teacher: status 422, prompt must be text"),
        (Manners(adapters=("lora",), name="base"), r"serves 'base', 'lora', and server.model_name is 'tiny'"),
    ],
)
def test_a_server_that_cannot_be_the_teacher_is_refused_before_the_search(
    pair: Pair, manners: Manners, message: str
) -> None:
    stub = StubServer(pair.teacher, pair.teacher_model, manners)
    with stub.running(), pytest.raises(ServerError, match=message):
        connect(pair, stub, model_name="tiny")


def test_one_of_several_models_is_chosen_by_name(pair: Pair, stub: StubServer) -> None:
    stub.manners.adapters = ("lora",)
    assert connect(pair, stub).server.model == "tiny"  # type: ignore[union-attr]
    engine = connect(pair, stub, model_name="lora")
    responses(engine)
    assert {request["model"] for request in stub.requests[-3:]} == {"lora"}
    assert engine.fingerprints["teacher"].startswith("lora ")


def test_a_url_of_something_else_is_refused(pair: Pair, stub: StubServer) -> None:
    with pytest.raises(ServerError, match=r"does not know the model or the path \(status 404, no path\)"):
        Engine.from_pretrained(stub.url.removesuffix("/v1"), pair.student, teacher_tokenizer=pair.teacher)


def test_the_key_comes_from_the_environment_and_is_in_no_message(
    pair: Pair, stub: StubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stub.manners.key = "secret-7"
    with pytest.raises(ServerError, match=r"status 401.*GENSSD_API_KEY or OPENAI_API_KEY.*none is set"):
        connect(pair, stub)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-8")
    with pytest.raises(ServerError, match="it was refused") as refused:
        connect(pair, stub)
    assert "wrong-8" not in str(refused.value)
    monkeypatch.setenv("GENSSD_API_KEY", "secret-7")
    engine = connect(pair, stub)
    responses(engine)
    assert set(stub.keys[-3:]) == {"Bearer secret-7"}
    assert "secret-7" not in caplog.text + repr(engine) + repr(engine.server)
    monkeypatch.setenv("GENSSD_API_KEY", "two\nlines")
    with pytest.raises(ServerError, match="holds characters that no key has"):
        connect(pair, stub)


def test_the_key_is_cut_from_what_a_server_says(pair: Pair, stub: StubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENSSD_API_KEY", "fault")  # a word of the message
    engine = connect(pair, stub, in_flight=1)
    stub.faults.append("400")
    failed = next(engine.iter_select_expand(PROMPTS, **SEARCH))
    assert "status 400, *** 400" in str(failed.error)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:word@host:8000/v1", "holds a password"),
        ("http://host:8000/v1?key=word", "holds a password, a query"),
        ("http://:8000/v1", "names no host"),
        ("http://host:port/v1", "cannot be read"),
    ],
)
def test_urls_with_secrets_or_without_a_host_are_refused(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        parse_url(url)
    assert "word@" not in str(refused.value)
    assert "key=word" not in str(refused.value)


def test_urls_are_told_from_names_of_models() -> None:
    assert is_url("HTTP://host/v1")
    assert not is_url("org/http")
    assert not is_url(None)
    address = parse_url("https://host/v1/")
    assert (address.port, address.path, address.url) == (443, "/v1", "https://host/v1")
    with pytest.raises(CheckpointError, match=r"is the URL of a server.*here the weights themselves are needed"):
        Engine.from_pretrained(student="http://host:8000/v1")


@pytest.mark.parametrize("options", [{"in_flight": 0}, {"timeout": 0.0}, {"patience": -1.0}, {"in_flight": "many"}])
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        ServerOptions(**options)


def test_without_token_ids_the_text_is_taken_where_it_leaves_no_doubt(caplog: pytest.LogCaptureFixture) -> None:
    teacher, student = map(Path, MODELS)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    options: Any = {"sampling": Sampling(temperature=0.0), "n": 1, "max_tokens": 30}
    prompt = [{"role": "user", "content": "7+8"}]
    with StubServer(teacher, model, Manners(ids=False, named_ids=False)).running() as stub:
        engine = Engine.from_pretrained(stub.url, student, memory_bytes=1 << 22, teacher_tokenizer=teacher)
        assert "returns no token ids" in caplog.text
        (completions,) = engine.generate([prompt], **options)
        assert engine.usage.served_from_text == 1
        assert engine.server is not None
    (expected,) = Engine.from_pretrained(teacher, memory_bytes=1 << 22).generate([prompt], **options)
    assert completions[0].token_ids == expected[0].token_ids


def test_text_whose_tokens_are_in_doubt_is_refused_by_name(pair: Pair) -> None:
    """The byte tokenizer has many ids whose text by itself is no character."""
    stub = StubServer(pair.teacher, pair.teacher_model, Manners(ids=False, named_ids=False))
    with stub.running(), pytest.raises(ServerError, match="cannot be told from the text: take a server that returns"):
        connect(pair, stub)


def test_most_likely_tokens_that_come_as_text_need_a_text_of_their_own(pair: Pair) -> None:
    with StubServer(pair.teacher, pair.teacher_model, Manners(named_ids=False)).running() as stub:
        engine = connect(pair, stub)
        with pytest.raises(InputError, match=r"came as text, which .* tokens have: teacher_topk needs a server that"):
            engine.select_expand(PROMPTS, teacher_topk=20)


def test_ids_in_the_names_of_tokens_are_enough(pair: Pair, stub: StubServer) -> None:
    expected = responses(connect(pair, stub))
    stub.manners.ids = False
    engine = connect(pair, stub)
    assert responses(engine) == expected
    assert engine.usage.served_from_text == 0


def test_a_tokenizer_that_is_not_at_hand_is_the_students_or_asked_for(
    pair: Pair, stub: StubServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    engine = Engine.from_pretrained(stub.url, pair.student, dtype="float32", memory_bytes=1 << 22)
    assert engine.server is not None
    assert engine.server.tokenizer == str(pair.student)
    assert "the student's is taken" in caplog.text
    with pytest.raises(InputError, match="give teacher_tokenizer, a hub id or a directory"):
        Engine.from_pretrained(stub.url)
    stub.manners.root = str(pair.teacher)
    assert Engine.from_pretrained(stub.url).server.tokenizer == str(pair.teacher)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="/nowhere does not exist"):
        Engine.from_pretrained(stub.url, teacher_tokenizer="/nowhere")


def test_a_tokenizer_of_another_model_is_refused(pair: Pair, stub: StubServer, tmp_path: Path) -> None:
    """Its letters are those of other ids."""
    for path in pair.teacher.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = fields["model"]["vocab"]
    last = len(vocabulary) - 1
    fields["model"]["vocab"] = {piece: last - i for piece, i in vocabulary.items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    options = {"server": ServerOptions(patience=2.0), "memory_bytes": 1 << 22}
    with pytest.raises(
        ServerError, match=r"the tokenizer .* is not that of tiny, .* it reads '.*' where the server wrote"
    ):
        Engine.from_pretrained(stub.url, teacher_tokenizer=tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(ServerError, match=r"cannot be the teacher: status 400, Token id \d+ is out of vocabulary"):
        Engine.from_pretrained(stub.url, MODELS[1], teacher_tokenizer=MODELS[0], **options)  # type: ignore[arg-type]


def test_retry_after_is_read_in_both_forms() -> None:
    def answer(value: str) -> float | None:
        return Answer(status=429, headers={"retry-after": value}, body=b"").retry_after

    assert answer("7") == 7.0
    assert answer("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert answer("soon") is None
    assert Answer(status=500, headers={}, body=b"").message == "no message"
    assert Answer(status=500, headers={}, body=b'{"detail": "x"}').message == "x"


def test_server_errors_are_errors_of_a_user() -> None:
    assert issubclass(ServerError, GenssdError)
