"""The list of checks, the line about them, and what docs/doctor.md says of the findings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.configs import MODELS
from support.doctor import EXAMPLES, PROBLEMS, copy_of, settings_of, write_rows

from genssd.distill.doctor.examine import CHECKS, describe, examine, summarise
from genssd.distill.doctor.findings import Finding, Level, count_levels, find_worst, list_lines
from genssd.distill.doctor.settings import EXAMINED, Settings
from genssd.distill.train.config import TrainSettings

DOCS = Path(__file__).resolve().parents[3] / "docs/doctor.md"


@pytest.mark.source
def test_every_finding_is_in_the_docs(tmp_path: Path) -> None:
    """Findings are named in the table, those of one model with dots in place of its role."""
    data, rows = write_rows(tmp_path / "p.jsonl", PROBLEMS), write_rows(tmp_path / "e.jsonl", EXAMPLES)
    pair = {"teacher": MODELS[0], "student": MODELS[1]}
    train = TrainSettings(kd_ratio=1.0, teacher_model_name_or_path=MODELS[1])
    settings = settings_of("distill", **pair, data=data, eval_data=data, train=train)
    findings = examine(settings, rows=9, verify_seconds=1.0)
    findings += examine(settings_of("train", model_name_or_path=MODELS[1], data=(rows,)), rows=9)
    findings += examine(settings_of("generate", teacher=MODELS[0], data=write_raw(tmp_path)), rows=9)
    table = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    documented = {name for line in table for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])}
    names = {re.sub(r"(of the|transformers,) (teacher|student)$", r"\1 ...", finding.name) for finding in findings}
    assert names <= documented
    assert documented - names == {"run", "hub", "ends of both"} | {name for name in documented if "teacher 2" in name}
    assert len(CHECKS) > 15


def write_raw(directory: Path) -> str:
    return write_rows(directory / "raw.jsonl", [{"prompt": "2 + 2 =", "answer": "4"}])


def find(level: Level, name: str = "a") -> Finding:
    return Finding(name=name, level=level, line=f"it is {level}")


def test_the_worst_level_counts() -> None:
    assert find_worst([]) == "ok"
    assert find_worst([find("ok"), find("warning")]) == "warning"
    assert find_worst([find("error"), find("warning")]) == "error"
    assert count_levels([find("ok"), find("ok"), find("error")]) == {"ok": 2, "warning": 0, "error": 1}


def test_one_line_names_the_worst_finding() -> None:
    assert describe([find("ok"), find("ok")], "x") == "2 checks before loading: all ok"
    line = describe([find("ok"), find("warning", "w"), find("error", "e")], "genssd doctor train")
    assert line == "error: e: it is error (and 1 more); `genssd doctor train` with the same flags shows all"
    line = describe([find("warning", "w")], "genssd doctor train")
    assert line == "warning: w: it is warning; `genssd doctor train` with the same flags shows all"


def test_long_lists_are_cut() -> None:
    (piece,) = list_lines([str(i) for i in range(13)])
    assert piece.text.splitlines()[-2:] == ["9", "and 3 more"]
    assert list_lines([]) == ()


def test_what_cannot_be_opened_has_no_line_and_is_a_finding(tmp_path: Path) -> None:
    settings = settings_of("evaluate", model=str(tmp_path), data=write_rows(tmp_path / "d.jsonl", PROBLEMS))
    assert summarise(settings) is None
    findings = examine(settings, rows=5)
    assert findings[0].level == "error"
    assert "has no config.json" in findings[0].line
    assert summarise(settings_of("evaluate", model=MODELS[1], data=str(tmp_path / "d.jsonl"), max_tokens=9)) is not None


@pytest.mark.parametrize("command", EXAMINED)
@pytest.mark.parametrize("broken", ["teacher", "student", "data", "weights"])
def test_what_is_broken_is_a_finding_and_no_failure(command: str, broken: str, tmp_path: Path) -> None:
    """Whatever cannot be opened, the other checks go on without it."""
    pair = [copy_of(Path(model), tmp_path / Path(model).name) for model in MODELS]
    data = write_rows(tmp_path / "d.jsonl", EXAMPLES if command == "train" else PROBLEMS)
    if broken == "data":
        data = write_rows(tmp_path / "d.jsonl", [{"nothing": 1}])
    elif broken == "weights":
        for model in pair:
            (model / "model.safetensors").write_bytes(b"nothing")
    else:
        (pair[broken == "student"] / "config.json").write_text("{")
    fields: dict[str, Any] = {
        "train": {
            "model_name_or_path": str(pair[1]),
            "data": (data,),
            "kd_ratio": 1.0,
            "teacher_model_name_or_path": str(pair[0]),
        },
        "evaluate": {"model": str(pair[broken != "teacher"]), "data": data},
    }.get(command, {"teacher": str(pair[0]), "student": str(pair[1]), "data": data})
    findings = examine(settings_of(command, **fields), rows=5)
    assert find_worst(findings) == "error"
    assert "kernels" in [finding.name for finding in findings]


def test_no_weights_are_read_without_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("genssd.engine.checkpoints.weights.WeightFiles.reading", refuse)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    settings = Settings(models={"teacher": MODELS[0], "student": MODELS[1]})
    assert find_worst(examine(settings, rows=1)) == "ok"
    with pytest.raises(AssertionError, match="weights were read"):
        examine(settings, rows=1, verify_seconds=1.0)
