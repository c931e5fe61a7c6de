"""What `genssd report` does with directories that are no runs, with damaged files, and with what is gone."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from support.failing_disk import FailingDisk
from support.pages import list_trees, read_page
from support.report_runs import Runs
from support.selections import config_for
from support.tiny_pair import TinyPair

from genssd.cli import main
from genssd.distill.report.config import ReportConfig
from genssd.distill.report.run import ReportSummary, run_report
from genssd.distill.runs.journal import make_line
from genssd.distill.select.reselect import run_reselect
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError


def report(tmp_path: Path, *names: Path, **options: Any) -> tuple[ReportSummary, dict[str, Any]]:
    summary = run_report(ReportConfig(run=tuple(map(str, names)), output=str(tmp_path / "page.html"), **options))
    return summary, read_page(summary.path)


@pytest.fixture
def copied(runs: Runs, tmp_path: Path) -> Path:
    """A copy of the search, to be damaged."""
    return Path(shutil.copytree(runs.select, tmp_path / "copied"))


def change_line(path: Path, number: int, change: Any) -> None:
    """Replace a line by another, whose checksum is right."""
    rows = path.read_bytes().splitlines(keepends=True)
    row = json.loads(rows[number])
    row.pop("checksum")
    change(row)
    rows[number] = make_line(row)
    path.write_bytes(b"".join(rows))


def test_directories_that_hold_no_run(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing is no directory; name the output directory of a run"):
        report(tmp_path, tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no run: it has no run\.json.* select, generate, train, "):
        report(tmp_path, tmp_path / "empty")
    assert not (tmp_path / "page.html").exists()
    run_reselect(ReselectConfig(run=str(runs.select), criterion="rsr", output_dir=str(tmp_path / "again")))
    with pytest.raises(InputError, match=r"again is a run of genssd reselect: name the run of select that it judged"):
        report(tmp_path, tmp_path / "again")
    for command, message in (("score", r"whose page is .*report\.html: open it"), ("leaf", "the page shows runs of")):
        folder = tmp_path / command
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"command": command}))
        with pytest.raises(InputError, match=rf"{command} is a run of genssd {command}[,;] ?{message}"):
            report(tmp_path, folder)


def test_options_that_cannot_be(tmp_path: Path) -> None:
    for options, message in (
        ({"run": ()}, "at least one run"),
        ({"prompts": 0}, "prompts must be at least 1, not 0"),
        ({"criteria": ("ppl", "ppl")}, "listed twice"),
        ({"criteria": ("nonsense",)}, "unknown criterion 'nonsense'"),
    ):
        with pytest.raises(InputError, match=message):
            ReportConfig(**{"run": ("r",), **options})
    with pytest.raises(InputError, match="aslec_casl is fitted over all of the data"):
        report(tmp_path, tmp_path, criteria=("aslec_casl",))
    with pytest.raises(InputError, match=r"dtype='float32' has no effect: it needs student"):
        report(tmp_path, tmp_path, dtype="float32")


def test_a_file_that_is_no_page_is_not_replaced(runs: Runs, tmp_path: Path) -> None:
    report(tmp_path, runs.select)
    report(tmp_path, runs.select)  # its own page it replaces
    page = tmp_path / "page.html"
    page.write_text("<p>mine</p>")
    with pytest.raises(InputError, match=r"page\.html is no page of genssd; choose another name, or remove it"):
        report(tmp_path, runs.select)
    assert page.read_text() == "<p>mine</p>"
    page.unlink()
    page.mkdir()
    with pytest.raises(InputError, match=r"page\.html is a directory; name a file"):
        report(tmp_path, runs.select)


def test_a_run_of_an_earlier_version(copied: Path, tmp_path: Path) -> None:
    record = json.loads((copied / "run.json").read_text())
    settings = record.pop("settings")
    (copied / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="was written by another version of genssd: it has no settings"):
        report(tmp_path, copied)
    (copied / "run.json").write_text(json.dumps({**record, "settings": settings}))
    change_line(copied / "decisions.jsonl", 1, lambda row: row.pop("rounds"))
    summary, page = report(tmp_path, copied)
    assert len(page["list-0"]) == summary.prompts == 2
    (fault,) = summary.faults
    assert "selections.jsonl, line 2 is left out: it is not of the form that this version of genssd writes" in fault
    assert page["overview"]["faults"] == [fault]


def test_damaged_lines_are_named_and_left_out(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal, log = copied / "selections.jsonl", copied / "decisions.jsonl"
    first, second, third = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + second.replace(b'"status"', b'"STATUS"') + third + b"nonsense\n" + third)
    summary, page = report(tmp_path, copied)
    assert [fault.removeprefix(f"{copied}/") for fault in summary.faults] == [
        "selections.jsonl, line 2 is damaged: its checksum does not match",
        "selections.jsonl, line 4 is damaged: it is no JSON object",
        "selections.jsonl, line 5 repeats line 3",
    ]
    assert len(page["list-0"]) == 2
    with pytest.raises(SystemExit) as stop:
        main(["report", str(copied), "--output", str(tmp_path / "page.html")])
    assert stop.value.code == 2
    assert "3 lines could not be read; the page has all others:\n" in capsys.readouterr().err
    log.unlink()
    summary, page = report(tmp_path, copied)
    assert page["list-0"] == []
    assert sum("decisions.jsonl has no decisions of it" in fault for fault in summary.faults) == 2


ODD = (None, -1, 10**30, 0.5, math.inf, math.nan, "x", "\ud800", [], [[]], {}, True)


def mutate(row: dict[str, Any], generator: random.Random) -> None:
    """Replace or remove one value, at a random depth."""
    while True:
        key = generator.choice(list(row))
        value = row[key]
        inner = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        if isinstance(inner, dict) and inner and generator.random() < 0.7:
            row = inner
        elif generator.random() < 0.2:
            del row[key]
            return
        else:
            row[key] = generator.choice(ODD)
            return


def test_any_values_end_in_a_page_that_says_what_is_left_out(copied: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    originals = {name: (copied / name).read_bytes() for name in ("selections.jsonl", "decisions.jsonl")}
    left_out = 0
    for _ in range(40):
        for name, content in originals.items():
            rows = [json.loads(line) for line in content.splitlines()]
            for row in rows[:2]:
                row.pop("checksum")
                mutate(row, generator)
            bodies = [json.dumps(row)[:-1].encode() for row in rows[:2]]
            lines = [body + b', "checksum": "%08x"}\n' % crc32(body) for body in bodies]
            (copied / name).write_bytes(b"".join((*lines, content.splitlines(keepends=True)[2])))
        summary, page = report(tmp_path, copied, criteria=("rsr",))
        left_out += len(summary.faults)
        assert 1 <= len(page["list-0"]) <= 3
        assert len(page["list-0"]) + len(summary.faults) >= 3
        assert all("\n" not in fault for fault in summary.faults)
    assert left_out > 20


def test_a_disk_that_refuses_the_page_keeps_the_earlier_one(runs: Runs, tmp_path: Path) -> None:
    report(tmp_path, runs.select)
    before = (tmp_path / "page.html").read_bytes()
    with FailingDisk(tmp_path).patched() as disk:
        report(tmp_path, runs.select)
    for number in range(disk.count - 1):  # at the last one the page is there, and its directory cannot be synced
        with (
            FailingDisk(tmp_path, number).patched(),
            pytest.raises(InputError, match=r"page\.html cannot be written: No space left"),
        ):
            report(tmp_path, runs.select)
        assert (tmp_path / "page.html").read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_run_that_is_still_at_work(copied: Path, tmp_path: Path) -> None:
    (copied / "summary.json").unlink()
    journal = copied / "selections.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    summary, page = report(tmp_path, copied)
    assert summary.unfinished == (str(copied),)
    assert summary.faults == ()
    assert len(page["list-0"]) == 2
    assert page["overview"]["searches"][0]["is_finished"] is False
    journal.write_bytes(b"")
    summary, page = report(tmp_path, copied)
    assert (page["list-0"], summary.prompts) == ([], 0)
    journal.unlink()
    assert report(tmp_path, copied)[0].prompts == 0


def test_a_tokenizer_that_is_gone_or_another(copied: Path, tiny_pair: TinyPair, tmp_path: Path) -> None:
    record = json.loads((copied / "run.json").read_text())
    for student, message in (("gone", "cannot be loaded"), ("other", "has another tokenizer now than when")):
        folder = tmp_path / student
        if student == "other":
            shutil.copytree(tiny_pair.student, folder)
            vocabulary = json.loads((folder / "tokenizer.json").read_text())
            vocabulary["added_tokens"][-1]["content"] += "!"
            (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
        config = {**record["config"], "student": str(folder), "teacher": str(folder)}
        (copied / "run.json").write_text(json.dumps({**record, "config": config}))
        _, page = report(tmp_path, copied, criteria=("rsr", "aslec_drop"))
        search = page["overview"]["searches"][0]
        assert search["text_fault"].startswith("Tokens are shown as their ids")
        assert message in search["text_fault"]
        assert "without a tokenizer" in search["left_out"]["aslec_drop"]
        assert set(search["figures"]["criteria"]) == {"ppl", "rsr"}
        logged = json.loads((copied / "decisions.jsonl").read_text().splitlines()[0])
        tree = next(tree for entry, tree in list_trees(page) if entry["index"] == logged["index"])
        expected = "".join(f"⟨{token}⟩" for token in logged["candidates"][0]["token_ids"])
        assert tree["boxes"][0]["text"] == expected


def test_two_runs_on_different_prompts(runs: Runs, tiny_pair: TinyPair, tmp_path: Path) -> None:
    data = tmp_path / "other.jsonl"
    data.write_text(json.dumps({"question": "another?"}) + "\n")
    run_select(config_for(tiny_pair, data, tmp_path / "other"), tiny_pair.engine)
    _, page = report(tmp_path, runs.select, runs.beam, tmp_path / "other")
    keys = [{entry["key"] for entry in page[f"list-{i}"]} for i in range(3)]
    assert keys[0] == keys[1]
    assert len(keys[0]) == 3
    assert not keys[0] & keys[2]


def test_the_command_line(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    config = tmp_path / "report.yaml"
    config.write_text(f"run: [{runs.select}, {runs.beam}]\ncriteria: [rsr]\n")
    main(["report", str(runs.select), str(runs.beam), "--criteria", "rsr", "--output", str(output)])
    assert "2 searches with the trees of 6 prompts\nwritten to " in capsys.readouterr().out
    typed = read_page(output)
    main(["report", "--config", str(config), "--output", str(output)])
    assert read_page(output) == typed
    with pytest.raises(SystemExit):
        main(["report", "--output", str(output)])
    assert "report needs at least one run" in capsys.readouterr().err
