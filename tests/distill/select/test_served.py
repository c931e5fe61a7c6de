"""Commands over a served teacher: the rows of the teacher here, records, resuming, kills, refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stub_server import StubServer
from support.tiny_pair import TinyPair
from transformers import AutoModelForCausalLM

from genssd.cli import main
from genssd.distill.data.topk_store import TopkLocation
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import CheckpointError, InputError, ServerError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.served import client as client_module
from genssd.engine.served.options import ServerOptions
from genssd.kernels.logprob import TopK


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(client_module, "LONGEST_WAIT", 0.1)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("GENSSD_API_KEY", "key-of-the-test")


@pytest.fixture
def stub(tiny_pair: TinyPair) -> Iterator[StubServer]:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.teacher).eval()
    with StubServer(tiny_pair.teacher, model).running() as server:
        yield server


@pytest.fixture
def problems(write_rows: Callable[..., Path]) -> str:
    return str(write_rows([{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(4)]))


def select_config(stub: StubServer, pair: TinyPair, data: str, output_dir: Path, **changes: Any) -> SelectConfig:
    config = SelectConfig(
        teacher=stub.url,
        teacher_tokenizer=str(pair.teacher),
        student=str(pair.student),
        data=data,
        output_dir=str(output_dir),
        candidates=2,
        chunk=Chunk(tokens=3, until="a", limit=5),
        max_tokens=8,
        memory_bytes=1 << 22,
        server=ServerOptions(timeout=10.0, patience=10.0),
    )
    return dataclasses.replace(config, **changes)


def read_rows(output_dir: Path, name: str = "selections.jsonl") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output_dir / name).read_text().splitlines()]
    return sorted(rows, key=lambda row: row["index"])


def test_greedy_rows_are_those_of_the_teacher_here(
    stub: StubServer, tiny_pair: TinyPair, problems: str, tmp_path: Path
) -> None:
    served = select_config(
        stub, tiny_pair, problems, tmp_path / "served",
        candidates=1, sampling=Sampling(temperature=0.0, top_p=0.95), teacher_topk=3,
    )  # fmt: skip
    here = dataclasses.replace(
        served, teacher=str(tiny_pair.teacher), teacher_tokenizer=None, server=ServerOptions(),
        output_dir=str(tmp_path / "here"),
    )  # fmt: skip
    run_select(served)
    run_select(here, tiny_pair.engine)
    rows, expected = read_rows(tmp_path / "served"), read_rows(tmp_path / "here")
    for name in ("completion_ids", "status", "student_prompt_ids", "prompt_ids"):
        assert [row[name] for row in rows] == [row[name] for row in expected], name
    assert rows[0]["teacher"] == {"name": stub.url, "fingerprint": read_record(tmp_path / "served")["teacher"]}
    for row, mine in zip(rows, expected, strict=True):
        one, other = (read_topk(r, tmp_path / name) for r, name in ((row, "served"), (mine, "here")))
        assert one.ids.tolist() == other.ids.tolist()
        torch.testing.assert_close(one.logprob, other.logprob, atol=1e-4, rtol=1e-4)


def read_topk(row: dict[str, Any], output_dir: Path) -> TopK:
    """The teacher's most likely tokens along the best trajectory of a row."""
    place = {**row["teacher_topk"], "where": "row"}
    return TopkLocation(path=output_dir / place.pop("file"), num_bytes=place.pop("bytes"), **place).read()


def read_record(output_dir: Path) -> dict[str, Any]:
    """The server of a run by its run.json, and the fingerprint of its model."""
    record = json.loads((output_dir / "run.json").read_text())
    return {**record["server"], "teacher": record["settings"]["teacher"]["content"]}


def test_the_record_names_the_server_and_no_file_holds_the_key(
    stub: StubServer, tiny_pair: TinyPair, problems: str, tmp_path: Path
) -> None:
    run_select(select_config(stub, tiny_pair, problems, tmp_path / "run"))
    record = read_record(tmp_path / "run")
    assert record["teacher"].startswith("tiny ")
    assert (record["url"], record["model"], record["positions"]) == (stub.url, "tiny", 512)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["server"]["requests"] > 4
    assert set(stub.keys) == {"Bearer key-of-the-test"}
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"key-of-the-test" in p.read_bytes()]


def test_a_run_is_resumed_over_the_same_model_alone(
    stub: StubServer, tiny_pair: TinyPair, problems: str, tmp_path: Path
) -> None:
    config = select_config(stub, tiny_pair, problems, tmp_path / "run")
    whole = run_select(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    run_select(dataclasses.replace(config, limit=2))
    stub.kill()
    stub.port = 0
    stub.start()  # at another place
    moved = dataclasses.replace(config, teacher=stub.url, resume=True)
    stub.manners.positions = 400
    with pytest.raises(InputError, match=r"was begun with teacher='http://.*' \(tiny [0-9a-f]{16}\), not '"):
        run_select(moved)
    stub.manners.positions = 512
    assert run_select(moved).prompts == whole.prompts == 4
    rows, expected = read_rows(tmp_path / "run"), read_rows(tmp_path / "whole")
    assert [row["completion_ids"] for row in rows] == [row["completion_ids"] for row in expected]


def test_fifty_kills_of_the_server_lose_nothing(
    stub: StubServer, tiny_pair: TinyPair, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    data = str(write_rows([{"question": f"{i}+{i}?"} for i in range(19)], "many.jsonl"))
    config = select_config(
        stub, tiny_pair, data, tmp_path / "calm", candidates=1, chunk=Chunk(tokens=2, until=None), max_tokens=12
    )  # fmt: skip
    run_select(config)
    stub.kill_every = 3
    config = dataclasses.replace(config, output_dir=str(tmp_path / "killed"), server=ServerOptions(in_flight=2))
    summary = run_select(config)
    assert stub.num_kills >= 50
    assert summary.prompts == 19
    rows, expected = read_rows(tmp_path / "killed"), read_rows(tmp_path / "calm")
    assert [row["completion_ids"] for row in rows] == [row["completion_ids"] for row in expected]


def test_a_server_that_does_not_come_back_leaves_the_finished_prompts(
    stub: StubServer, tiny_pair: TinyPair, problems: str, tmp_path: Path
) -> None:
    config = select_config(
        stub, tiny_pair, problems, tmp_path / "run", server=ServerOptions(patience=0.3, in_flight=1)
    )  # fmt: skip
    done = []

    class Stopping:
        def __call__(self, ended: int, total: int, note: str = "") -> None:
            done.append(ended)
            if ended == 2:
                stub.kill()

        def begin(self, *_: Any, **__: Any) -> None: ...
        def note(self, *_: Any) -> None: ...

    with pytest.raises(ServerError, match=r"has not answered for 0.3 seconds .* go on with --resume"):
        run_select(config, report=Stopping())  # type: ignore[arg-type]
    assert len(read_rows(tmp_path / "run")) >= 2
    with pytest.raises(ServerError, match="is not there"):
        run_select(dataclasses.replace(config, resume=True))
    stub.start()
    assert run_select(dataclasses.replace(config, resume=True)).prompts == 4


def test_generate_writes_by_a_server_with_or_without_a_student(
    stub: StubServer, tiny_pair: TinyPair, problems: str, tmp_path: Path
) -> None:
    config = GenerateConfig(
        teacher=stub.url, teacher_tokenizer=str(tiny_pair.teacher), data=problems, n=2, max_tokens=4,
        output_dir=str(tmp_path / "alone"),
    )  # fmt: skip
    assert run_generate(config).prompts == 4
    both = dataclasses.replace(config, student=str(tiny_pair.student), output_dir=str(tmp_path / "both"))
    assert run_generate(dataclasses.replace(both, memory_bytes=1 << 22)).prompts == 4
    alone, beside = (read_rows(tmp_path / name, "responses.jsonl") for name in ("alone", "both"))
    assert [row["prompt_ids"] for row in alone] == [row["prompt_ids"] for row in beside]
    with pytest.raises(InputError, match="rsd judges every token before the next one is drawn"):
        dataclasses.replace(both, method="rsd")


def test_prompts_that_the_server_refuses_are_bad_rows(
    stub: StubServer, tiny_pair: TinyPair, problems: str, tmp_path: Path
) -> None:
    config = select_config(stub, tiny_pair, problems, tmp_path / "run", server=ServerOptions(in_flight=1))
    stub.faults.extend(["", "", "", "400"])  # three requests try the server
    summary = run_select(config)
    assert summary.prompts == 3
    assert "status 400, fault 400" in (tmp_path / "run" / "bad_rows.txt").read_text()


def test_a_student_without_a_chat_template_is_refused(
    stub: StubServer, tiny_pair: TinyPair, problems: str, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    student.mkdir()
    for path in tiny_pair.student.iterdir():
        if path.name != "chat_template.jinja":
            (student / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"chat.template"):
        run_select(select_config(stub, tiny_pair, problems, tmp_path / "run", student=str(student)))


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("score", ["--criteria", "divergence"]),
        ("leaf", []),
        ("diagnose", []),
    ],
)
def test_commands_that_need_the_weights_refuse_a_server(
    tiny_pair: TinyPair, write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    command: str, flags: list[str],
) -> None:  # fmt: skip
    data = str(write_rows([{"question": "1+1?", "response": "2", "answer": "2"}]))
    with pytest.raises(SystemExit):
        main(
            [
                command,
                "--teacher",
                "http://127.0.0.1:1/v1",
                "--student",
                str(tiny_pair.student),
                "--data",
                data,
                *flags,
                "--output-dir",
                str(tmp_path / "run"),
            ]
        )
    assert "is the URL of a server, which can be the teacher that writes in select" in capsys.readouterr().err


def test_options_of_a_server_without_one_are_refused(tiny_pair: TinyPair, problems: str, tmp_path: Path) -> None:
    config = SelectConfig(
        teacher=str(tiny_pair.teacher), student=str(tiny_pair.student), data=problems, output_dir=str(tmp_path / "x"),
        server=ServerOptions(in_flight=3),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"server.in_flight=3 has no effect: it needs a teacher that is the URL"):
        run_select(config)


def test_the_sampling_of_the_model_is_read_from_the_tokenizers_directory(
    stub: StubServer, tiny_pair: TinyPair, problems: str, tmp_path: Path
) -> None:
    config = select_config(stub, tiny_pair, problems, tmp_path / "run", generation_config=True)
    with pytest.raises(InputError, match="give teacher_tokenizer, which has the file"):
        run_select(dataclasses.replace(config, teacher_tokenizer=None))
    directory = tmp_path / "teacher"
    directory.mkdir()
    for path in tiny_pair.teacher.iterdir():
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    fields = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps({**fields, "temperature": 0.5, "top_k": 7}))
    run_select(dataclasses.replace(config, teacher_tokenizer=str(directory)))
    assert {(request["temperature"], request["top_k"]) for request in stub.requests[3:]} == {(0.5, 7)}
    with pytest.raises(CheckpointError, match=r"does not exist"):
        run_select(dataclasses.replace(config, teacher_tokenizer="/nowhere"))
