"""The model card of a training, and sending both to a hub."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from support.stub_hub import TOKEN, StubHub, run_stub_hub
from support.tiny_pair import TinyPair
from support.training_runs import ROWS, config_for

from genssd.cli import main
from genssd.distill.doctor.inputs import open_inputs
from genssd.distill.doctor.settings import read_settings
from genssd.distill.doctor.upload_checks import check_upload
from genssd.distill.runs.hub_name import check_repository
from genssd.distill.runs.hub_upload import UPLOADED, prepare_repository
from genssd.distill.runs.source_version import find_commit
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.model_card import CardInputs, DataSource, Origin, read_base, read_front_matter, render_card
from genssd.distill.train.trainer import TrainSummary, run_train
from genssd.engine.common.errors import InputError
from genssd.flags import read_config

Write = Callable[..., Path]


@dataclasses.dataclass(frozen=True)
class Result:
    steps: int = 3
    examples: int = 11
    tokens: int = 1234
    loss: float = 0.51239
    best_eval_loss: float | None = None


def card_of(directory: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter of a card, as the hub's own library reads it, and its text."""
    card: Any = ModelCard.load(directory / "README.md")
    return card.data.to_dict(), card.text


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the rows of the tables of a card by their first cell."""
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first.strip().strip("`"): [cell.strip().strip("`") for cell in rest] for first, *rest in cells}


@pytest.fixture(scope="module")
def trained(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainSummary]:
    """A training of two steps on a selection of genssd, from a directory whose own card names its base and license."""
    folder = tmp_path_factory.mktemp("card")
    data = folder / "select" / "selections.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"teacher": {"name": "T|1", "content": "x"}, "criterion": "ppl", "data": {"name": "org/set:train"}}
    (data.parent / "run.json").write_text(json.dumps({"command": "select", "settings": settings}))
    config = config_for(tiny_pair, data, folder / "run", max_steps=2, seed=5, kd_ratio=0.0)
    return config, run_train(config)


def test_the_front_matter_is_what_the_hub_reads(trained: tuple[TrainConfig, TrainSummary]) -> None:
    matter, _ = card_of(trained[1].output_dir)
    assert matter == {
        "datasets": ["org/set"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["genssd", "distillation"],
    }


def test_the_card_states_data_options_and_result(trained: tuple[TrainConfig, TrainSummary]) -> None:
    config, summary = trained
    _, text = card_of(summary.output_dir)
    rows = rows_of(text)
    content = hashlib.sha256(Path(config.data[0]).read_bytes()).hexdigest()[:16]
    assert rows[config.data[0]] == [content, "genssd select`, teacher `T\\|1`, criterion `ppl"]
    assert rows["loss of the last step"] == [f"{summary.loss:.4f}"]
    assert rows["tokens"] == [f"{summary.tokens:,} completion tokens"]
    assert rows["steps"] == ["2 optimizer steps"]
    assert rows["seed"] == ["5"]
    assert rows["learning_rate"] == ["0.001"]
    assert "kd_ratio" not in rows
    assert f"genssd {version('genssd')}" in rows["versions"][0]


def test_the_command_of_the_card_gives_the_same_training(trained: tuple[TrainConfig, TrainSummary]) -> None:
    config, summary = trained
    _, text = card_of(summary.output_dir)
    _, _, *flags = shlex.split(text.split("```\n")[1])
    read = read_config("train", flags, TrainConfig)
    assert read.template_date is not None  # that of the run, and its number of threads
    assert dataclasses.replace(read, template_date=None, threads=None) == config


def test_what_is_trained_further_has_the_first_base_and_its_license(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nbase_model: org/base\nlicense: mit\n---\n# text\n---\n")
    base = read_base(str(tmp_path), tmp_path)
    assert (base.repository, base.license) == ("org/base", "mit")


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\nbase_model: [a, b\n---\n", "---\n- 1\n---\n", "---\na"]
)
def test_a_card_that_cannot_be_read_tells_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert read_front_matter(tmp_path / "README.md") == {}
    base = read_base(str(tmp_path), tmp_path)
    assert (base.repository, base.license) == (None, None)


def test_a_base_of_the_hub_is_named_with_its_license(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: own\nbase_model: org/older\n---\n")
    config = TrainConfig(model_name_or_path="org/student", data=("org/rows:train", "x.jsonl"))
    sources = (
        DataSource(name="org/rows:train", content="0" * 16, repository="org/rows", origin=None),
        DataSource(name="x.jsonl", content="1" * 16, repository=None, origin=None),
    )
    text = render_card(config, CardInputs(student=tmp_path, data=sources, held_out=()), Result())
    matter = yaml.safe_load(text.split("---\n")[1])
    assert matter["base_model"] == "org/student"
    assert matter["base_model_relation"] == "finetune"
    assert (matter["license"], matter["license_name"]) == ("other", "own")
    assert matter["datasets"] == ["org/rows"]
    assert matter["tags"] == ["genssd", "sft"]
    assert rows_of(text)["x.jsonl"] == ["1" * 16, "unknown"]


def test_names_cannot_break_the_card(tmp_path: Path) -> None:
    name = "a|b`c\n| seed | 9 |"
    config = TrainConfig(model_name_or_path=str(tmp_path), data=(name,), system_prompt="```\n# heading\n```", seed=1)
    origin = Origin(command="select", settings={"criterion": "x\n---\nlicense: mit"})
    sources = (DataSource(name=name, content="0" * 16, repository=None, origin=origin),)
    text = render_card(config, CardInputs(student=tmp_path, data=sources, held_out=()), Result(loss=float("nan")))
    text, command = text.split("## Command")
    assert rows_of(text)["seed"] == ["1"]
    assert rows_of(text)["loss of the last step"] == ["none"]
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "transformers"
    _, _, *flags = shlex.split(command.split("````\n")[1])
    assert read_config("train", flags, TrainConfig) == config


def test_the_commit_is_that_of_our_own_sources_alone(tmp_path: Path) -> None:
    assert find_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.example"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert find_commit(tmp_path) is None  # the repository of another project
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/CMakeLists.txt").touch()
    done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert find_commit(tmp_path) == done.stdout[:12]
    subprocess.run([*git, "add", "csrc"], check=True)
    assert find_commit(tmp_path) == f"{done.stdout[:12]}, changed"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    with run_stub_hub() as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield stub


def test_the_trained_model_is_sent_with_its_card(
    hub: StubHub, tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    config = config_for(tiny_pair, write_rows(ROWS), tmp_path / "run", max_steps=1, save_steps=1)
    run_train(dataclasses.replace(config, push_to_hub="team/model"))
    files = hub.repositories["team/model"]
    assert hub.private == {"team/model": True}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert all(content == (tmp_path / "run" / name).read_bytes() for name, content in files.items())
    runs_own = {"run.json", "summary.json", "metrics.jsonl", "checkpoint-1/config.json"}
    assert all((tmp_path / "run" / name).exists() for name in runs_own)
    assert not runs_own & files.keys()
    of_the_model = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()} - runs_own - {".lock"}
    assert of_the_model == files.keys()


def test_a_hub_that_refuses_the_model_loses_nothing(
    hub: StubHub, tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.takes_commits = False
    flags = ["--model-name-or-path", str(tiny_pair.student), "--data", str(write_rows(ROWS))]
    flags += ["--output-dir", str(tmp_path / "run"), "--max-steps", "1", "--push-to-hub", "team/model"]
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"the trained model is complete in {tmp_path / 'run'}, but was not sent to team/model" in message
    assert f"`hf upload team/model {tmp_path / 'run'} . --include {' '.join(repr(p) for p in UPLOADED)}`" in message
    assert (tmp_path / "run/model.safetensors").exists()
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 1


def refuse_rights(hub: StubHub, patch: pytest.MonkeyPatch) -> None:
    hub.writable = False


def forget_token(hub: StubHub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("genssd.distill.runs.hub_upload.get_token", lambda: None)


def mistype_token(hub: StubHub, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "hf_other")


def cut_network(hub: StubHub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (forget_token, "this machine has no token of the hub"),
        (mistype_token, "the hub refuses the token"),
        (cut_network, "the hub cannot be reached"),
        (refuse_rights, "as someone: the hub refuses the token"),
    ],
)
def test_a_hub_that_will_not_take_the_model_ends_the_training_before_it_begins(
    spoil: Callable[[StubHub, pytest.MonkeyPatch], None],
    reason: str,
    hub: StubHub,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Before anything is read: the files that the config names are not there."""
    spoil(hub, monkeypatch)
    config = TrainConfig(
        model_name_or_path="missing", data=("missing",), output_dir=str(tmp_path / "run"), push_to_hub="team/model"
    )
    with pytest.raises(InputError, match=f"push_to_hub team/model.*{reason}"):
        run_train(config)
    assert not (tmp_path / "run").exists()
    assert hub.repositories == {}


def test_a_repository_that_exists_is_kept(hub: StubHub) -> None:
    hub.repositories["team/model"] = {"old": b"x"}
    prepare_repository("team/model")
    assert hub.repositories == {"team/model": {"old": b"x"}}


def test_the_doctor_asks_the_hub_and_changes_nothing(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(model_name_or_path="missing", data=("missing",), push_to_hub="team/model")
    inputs = open_inputs(read_settings("train", config), 1)
    (found,) = check_upload(inputs)
    assert (found.level, found.line) == ("ok", "the model goes to team/model, as someone")
    assert hub.repositories == {}
    mistype_token(hub, monkeypatch)
    (found,) = check_upload(inputs)
    assert found.level == "error"
    assert found.fix is not None
    without = open_inputs(read_settings("train", dataclasses.replace(config, push_to_hub=None)), 1)
    assert check_upload(without) == []


@pytest.mark.parametrize("name", ["me/model", "A-1/b_2.c", "_/_"])
def test_names_of_repositories(name: str) -> None:
    check_repository(name, "push_to_hub")


@pytest.mark.parametrize(
    "name", ["", "model", "a/b/c", "/b", "a/", "-a/b", "a/b-", "a/b--c", "a/..", "a/b.git", "a b/c", "a/" + "b" * 96]
)
def test_what_is_no_name_of_a_repository_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="push_to_hub must be the name of a repository"):
        TrainConfig(model_name_or_path="S", data=("d",), push_to_hub=name)
