"""One run over its directory: begun, resumed or refused."""

from __future__ import annotations

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genssd.distill.runs.directory import claim_directory
from genssd.distill.runs.field_kinds import Operational
from genssd.distill.runs.journal import make_line, write_json
from genssd.distill.runs.run import Run
from genssd.engine.common.errors import InputError
from genssd.engine.models.launches import LaunchRecord


@dataclass(frozen=True, kw_only=True)
class Config:
    output_dir: Operational[str]
    resume: Operational[bool] = False
    size: int = 1
    threads: Operational[int] = 1


@dataclass(frozen=True, kw_only=True)
class OnceConfig:
    """A command that cannot resume."""

    output_dir: Operational[str]


def work(config: Config, *numbers: int) -> list[int]:
    """Journal the numbers; return those that were there before."""
    with Run.open(config, "count", journal="numbers.jsonl") as run:
        before = [row["number"] for row in run.done()]
        for number in numbers:
            run.journal.append({"number": number})
    return before


def test_a_run_is_recorded_resumed_and_keeps_how_it_was_begun(tmp_path: Path) -> None:
    directory = str(tmp_path / "run")
    assert work(Config(output_dir=directory), 1, 2) == []
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["command"] == "count"
    assert record["settings"] == {"size": 1}
    assert set(record["versions"]) == {"genssd", "torch", "transformers"}
    assert work(Config(output_dir=directory, resume=True, threads=3), 3) == [1, 2]
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["threads"] == 3
    assert work(Config(output_dir=directory, resume=True)) == [1, 2, 3]


def test_finished_work_needs_resume_and_the_same_settings(tmp_path: Path) -> None:
    directory = str(tmp_path / "run")
    work(Config(output_dir=directory), 1)
    with pytest.raises(
        InputError, match=r"numbers\.jsonl holds finished work already; pass --resume to go on, --overwrite to begin"
    ):
        work(Config(output_dir=directory))
    with pytest.raises(InputError, match=r"run was begun with size=1, not 2; resume with the same settings"):
        work(Config(output_dir=directory, resume=True, size=2))
    assert work(Config(output_dir=directory, resume=True)) == [1]


def test_a_run_without_finished_work_begins_anew(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    work(Config(output_dir=str(directory)), 1)
    (directory / "numbers.jsonl").write_text('{"number": 1')  # the first line was cut
    assert work(Config(output_dir=str(directory), size=2), 5) == []
    assert (directory / "numbers.jsonl").read_bytes() == make_line({"number": 5})


def test_a_torn_line_is_cut_before_the_next_is_written(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    work(Config(output_dir=str(directory)), 1, 2)
    whole = (directory / "numbers.jsonl").read_bytes()
    (directory / "numbers.jsonl").write_bytes(whole[:-3])
    assert work(Config(output_dir=str(directory), resume=True), 2) == [1]
    assert (directory / "numbers.jsonl").read_bytes() == whole


def test_work_that_is_not_kept_is_cut(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "run"), resume=True)
    work(config, 1, 2, 3)
    with Run.open(config, "count", journal="numbers.jsonl") as run:
        assert run.resumed
        run.keep(1)
        assert [row["number"] for row in run.done()] == [1]
        run.journal.append({"number": 7})
    assert work(config) == [1, 7]


def test_a_command_that_cannot_resume_asks_for_another_directory(tmp_path: Path) -> None:
    config = OnceConfig(output_dir=str(tmp_path / "run"))
    with Run.open(config, "once", journal="results.jsonl") as run:
        run.journal.append({})
    with (
        pytest.raises(InputError, match=r"results\.jsonl holds finished work already; choose another output_dir"),
        Run.open(config, "once", journal="results.jsonl"),
    ):
        pass


def test_parts_on_disk_are_a_run_that_has_begun(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "run"))
    with Run.open(config, "count", journal="numbers.jsonl", parts="part-*") as run:
        run.record()
        (tmp_path / "run/part-1").mkdir()
    with (
        pytest.raises(InputError, match="run holds finished work already"),
        Run.open(config, "count", journal="numbers.jsonl", parts="part-*"),
    ):
        pass
    again = Config(output_dir=config.output_dir, resume=True, size=2)
    with Run.open(again, "count", journal="numbers.jsonl", parts="part-*", free=("size",)) as run:
        assert run.resumed
        run.record()
    assert json.loads((tmp_path / "run/run.json").read_text())["settings"] == {"size": 2}


def test_the_directory_belongs_to_one_process_and_one_command(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "run"))
    with claim_directory(tmp_path / "run", "count"), pytest.raises(InputError, match="another run is at work in"):
        work(config)
    work(config, 1)
    with (
        pytest.raises(InputError, match="belongs to a run of `genssd count`"),
        Run.open(config, "other", journal="numbers.jsonl"),
    ):
        pass


def broken_records() -> dict[str, tuple[dict[str, Any], str]]:
    """Return changes of run.json, None for a removed key, with what the message says about each."""
    versions = {"genssd": "0.1.0", "torch": "2", "transformers": "5"}
    return {
        "no settings": ({"settings": None}, "was written by another version of genssd: it has no settings"),
        "settings": ({"settings": [1]}, "is damaged: settings must be an object; restore the file, or choose"),
        "config": ({"config": "a"}, "is damaged: config must be an object"),
        "no versions": ({"versions": None}, "is damaged: versions must be an object with the versions of genssd"),
        "version": ({"versions": {**versions, "torch": 2}}, "is damaged: versions must be an object with"),
        "python": ({"python": 3.11}, "is damaged: python must be a version"),
        "date": ({"template_date": 1}, "is damaged: template_date must be a date"),
        "launches": ({"launches": {"a": 1}}, "is damaged: launches must be objects with source, deterministic, digest"),
        "later": ({"versions": {**versions, "genssd": "99.1"}}, r"was written by genssd 99.1, which this version"),
        "odd": (
            {"versions": {**versions, "genssd": "x"}},
            r"was written by genssd x, which this version .* resume with",
        ),
        "command": ({"command": 7}, "is not of a run of genssd: it names no command; choose another output_dir"),
        "other": ({"command": "dance"}, "belongs to a run of `genssd dance`; choose another output_dir"),
    }


@pytest.mark.parametrize("name", broken_records())
def test_a_record_that_cannot_be_used_is_refused_by_file_and_key(tmp_path: Path, name: str) -> None:
    changes, message = broken_records()[name]
    directory = tmp_path / "run"
    work(Config(output_dir=str(directory)), 1)
    record = json.loads((directory / "run.json").read_text()) | changes
    write_json(directory / "run.json", {key: value for key, value in record.items() if value is not None})
    before = sorted((path.name, path.read_bytes()) for path in directory.iterdir())
    with pytest.raises(InputError, match=rf"/run(/run\.json)? {message}"):
        work(Config(output_dir=str(directory), resume=True), 2)
    assert sorted((path.name, path.read_bytes()) for path in directory.iterdir()) == before


def test_a_record_of_an_earlier_version_with_the_same_settings_is_resumed(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "run"), resume=True)
    work(config, 1)
    record = json.loads((tmp_path / "run/run.json").read_text())
    write_json(tmp_path / "run/run.json", record | {"versions": {**record["versions"], "genssd": "0.0.9"}})
    assert work(config, 2) == [1]
    assert json.loads((tmp_path / "run/run.json").read_text())["versions"]["genssd"] == "0.0.9"


@pytest.mark.parametrize("name", ["numbers.jsonl", "config.json", "model.safetensors", "data/rows.csv"])
def test_a_directory_with_files_of_no_run_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "theirs"
    (directory / name).parent.mkdir(parents=True)
    (directory / name).write_text("theirs")
    for resume in (False, True):
        with pytest.raises(InputError, match=rf"theirs holds {name.split('/')[0]}, but no run\.json of a run; restore"):
            work(Config(output_dir=str(directory), resume=resume), 1)
    assert [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()] == [Path(name)]
    assert (directory / name).read_text() == "theirs"


def test_an_empty_directory_is_taken_and_harmless_files_may_be_in_it(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    for name in ("select.log", "config.yaml", ".gitignore", ".notes.tmp", "run.json.tmp"):
        (directory / name).write_text("")
    work(Config(output_dir=str(directory)), 1)
    assert not (directory / "run.json.tmp").exists()  # a process was killed while it wrote run.json
    assert (directory / "select.log").exists()
    assert (directory / ".notes.tmp").exists()


def test_a_lost_record_is_named_with_the_remedy(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "run"), resume=True)
    work(config, 1)
    record = (tmp_path / "run/run.json").read_bytes()
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(InputError, match=r"run holds numbers\.jsonl, but no run\.json of a run; restore run\.json, or"):
        work(config, 2)
    (tmp_path / "run/run.json").write_bytes(record)
    assert work(config, 2) == [1]


def test_a_place_that_is_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, reason in {
        "file": "it is a file, not a directory",
        "file/deeper": "(it is a file, not a directory|Not a directory)",
        "link": "it is a link to a place that does not exist",
        "x" * 300: "File name too long",
        "a\0b": "embedded null byte",
    }.items():
        with pytest.raises(InputError, match=rf"output_dir .* cannot be written: {reason}"):
            work(Config(output_dir=str(tmp_path / name)), 1)
    assert not (tmp_path / "nowhere").exists()


def test_a_refused_command_leaves_no_directory_behind(tmp_path: Path) -> None:
    directory = tmp_path / "a/b/c"
    with (
        pytest.raises(InputError, match="no such model"),
        Run.open(Config(output_dir=str(directory)), "count", journal="numbers.jsonl"),
    ):
        raise InputError("no such model")
    assert not list(tmp_path.iterdir())
    directory.mkdir(parents=True)  # what the user made stays
    with pytest.raises(InputError, match="no such model"), claim_directory(directory, "count"):
        raise InputError("no such model")
    assert not list(directory.iterdir())
    (directory.parent / "other").write_text("")
    directory.rmdir()
    with pytest.raises(InputError, match="no such model"), claim_directory(directory, "count"):
        raise InputError("no such model")
    assert [path.name for path in directory.parent.iterdir()] == ["other"]


def test_a_lock_that_another_process_removed_locks_nothing(tmp_path: Path) -> None:
    """Between the opening of the file and its locking another process may fail and remove it."""
    directory = tmp_path / "run"
    real, removed = fcntl.flock, []

    def remove_first(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(True)
            (directory / ".lock").unlink()
        real(descriptor, operation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", remove_first)
        with (
            claim_directory(directory, "count"),
            pytest.raises(InputError, match="another run is at work"),
            claim_directory(directory, "count"),
        ):
            pass


def stop(config: Config, command: str, *numbers: int) -> str:
    """Return what a command that is interrupted after some numbers says about its directory."""

    def work_until_stopped() -> None:
        with Run.open(config, command, journal=None if command == "train" else "numbers.jsonl") as run:
            if command == "train":
                run.record()
            for number in numbers:
                run.journal.append({"number": number})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        work_until_stopped()
    (note,) = stopped.value.__notes__
    return str(note)


def test_a_stopped_run_says_what_is_on_disk(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    config = Config(output_dir=str(directory))
    assert stop(config, "select") == "nothing was written"
    assert not directory.exists()
    assert stop(config, "select", 1) == f"{directory}/numbers.jsonl holds 1 finished prompt; --resume continues"
    again = Config(output_dir=str(directory), resume=True)
    assert stop(again, "select", 2, 3) == f"{directory}/numbers.jsonl holds 3 finished prompts; --resume continues"


def test_a_stopped_training_names_its_newest_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    config = Config(output_dir=str(directory))
    said = stop(config, "train")
    assert said == f"{directory} holds no checkpoint (save_steps writes them); the training begins anew"
    (directory / "checkpoint-99").mkdir()  # incomplete
    for step in (2, 10):
        write_json(directory / f"checkpoint-{step}/trainer_state.json", {})
    assert stop(config, "train") == f"{directory}/checkpoint-10 is complete; --resume-from-checkpoint last continues"


def test_what_could_not_be_used_and_the_summary_are_written_whole(tmp_path: Path) -> None:
    with Run.open(Config(output_dir=str(tmp_path / "run")), "count", journal="numbers.jsonl") as run:
        run.write_bad_rows(["a, line 1: bad", "b, line 2: worse"])
        run.write_summary({"rows": 2})
    assert (tmp_path / "run/bad_rows.txt").read_text() == "a, line 1: bad\nb, line 2: worse\n"
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"rows": 2}
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_run_that_fails_before_its_first_result_leaves_the_directory_to_others(tmp_path: Path) -> None:
    directory = str(tmp_path / "run")
    with (
        pytest.raises(InputError, match="no such model"),
        Run.open(Config(output_dir=directory), "count", journal="numbers.jsonl"),
    ):
        raise InputError("no such model")
    assert not (tmp_path / "run/run.json").exists()
    with Run.open(Config(output_dir=directory), "other", journal="others.jsonl") as run:
        run.write_summary({})


def test_a_resume_that_its_command_refuses_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    directory = str(tmp_path / "run")
    work(Config(output_dir=directory), 1)
    before = (tmp_path / "run/run.json").read_bytes()
    again = Config(output_dir=directory, resume=True, threads=9)
    with pytest.raises(InputError, match="other data"), Run.open(again, "count", journal="numbers.jsonl") as run:
        raise InputError(f"other data than {list(run.done())}")
    assert (tmp_path / "run/run.json").read_bytes() == before


def test_a_resumed_run_has_no_summary_until_it_ends(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "run"), resume=True)
    with Run.open(config, "count", journal="numbers.jsonl") as run:
        run.journal.append({"number": 1})
        run.write_summary({"rows": 1})
    work(config, 2)
    assert not (tmp_path / "run/summary.json").exists()


def test_a_torn_line_is_cut_even_if_nothing_is_left_to_do(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "run"), resume=True)
    work(config, 1)
    whole = (tmp_path / "run/numbers.jsonl").read_bytes()
    (tmp_path / "run/numbers.jsonl").write_bytes(whole + b'{"number')
    with Run.open(config, "count", journal="numbers.jsonl") as run:
        run.write_summary({})
    assert (tmp_path / "run/numbers.jsonl").read_bytes() == whole


def made_engine(source: str | None, digest: str = "aa", *, models: tuple[str, ...] = ("t1", "s1")) -> Any:
    """An engine on a GPU with kernel configurations of this digest; source None: an engine on a CPU."""
    launches = None if source is None else LaunchRecord(source=source, deterministic=True, digest=digest)
    fingerprints = dict(zip(("teacher", "student"), models, strict=False))
    facts = {"threads": 2, "launches": launches, "fingerprints": fingerprints, "server": None}
    return SimpleNamespace(**facts, teachers=[SimpleNamespace(**facts)])


def work_on(engine: Any, config: Config, number: int) -> None:
    with Run.open(config, "count", journal="numbers.jsonl") as run:
        assert run.use(engine) is engine
        run.journal.append({"number": number})


def recorded(config: Config) -> Any:
    return json.loads((Path(config.output_dir) / "run.json").read_text()).get("launches")


def test_kernel_configurations_are_recorded_and_not_mixed(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "run"), resume=True)
    work_on(made_engine("shipped for sm_90"), config, 1)
    begun = {"t1+s1": {"source": "shipped for sm_90", "deterministic": True, "digest": "aa"}}
    assert recorded(config) == begun
    with pytest.raises(
        InputError,
        match=r"run was begun with other kernel configurations \(shipped for sm_90, deterministic=True\) than are used "
        r"now \(tuned for NVIDIA H200, deterministic=True\); resume .*, or choose another output_dir",
    ):
        work_on(made_engine("tuned for NVIDIA H200", "bb"), config, 2)
    assert recorded(config) == begun
    # tuning that found what ships; a part on a CPU; other models of the same run
    work_on(made_engine("tuned for NVIDIA H200"), config, 3)
    work_on(made_engine(None), config, 4)
    assert recorded(config) == begun
    work_on(made_engine("shipped for sm_90", "cc", models=("t2",)), config, 5)
    assert list(recorded(config)) == ["t1+s1", "t2"]
    assert [row["number"] for row in work_rows(config)] == [1, 3, 4, 5]


def work_rows(config: Config) -> list[dict[str, Any]]:
    with Run.open(config, "count", journal="numbers.jsonl") as run:
        return list(run.done())


def test_on_a_cpu_no_kernel_configuration_is_recorded(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "run"), resume=True)
    work_on(made_engine(None), config, 1)
    assert recorded(config) is None
    work_on(made_engine("generic"), config, 2)
    assert recorded(config)["t1+s1"]["source"] == "generic"


def test_configurations_of_a_model_loaded_late_are_recorded_at_once(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "run"))
    with Run.open(config, "count", journal="numbers.jsonl") as run:
        run.journal.append({"number": 1})
        run.use(made_engine("generic"))
        assert "t1+s1" in recorded(config)
