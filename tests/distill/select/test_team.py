"""`genssd select` with several teachers: rows, log and summary say who won; runs are resumed; rows are trained."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.pages import list_trees, read_page
from support.small_runs import VARYING
from support.tiny_pair import TinyPair
from support.toys import save_checkpoint

from genssd import Engine
from genssd.cli import main
from genssd.distill.data.example_files import read_examples
from genssd.distill.doctor.examine import examine
from genssd.distill.doctor.settings import read_settings
from genssd.distill.report.config import ReportConfig
from genssd.distill.report.run import run_report
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.reselect import run_reselect
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.search.budget import Budget

Write = Callable[..., Path]
PROMPTS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(4)]
SEARCH: dict[str, Any] = {"candidates": 2, "chunk": Chunk(tokens=4, until=None), "max_tokens": 12}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second teacher with other weights."""
    directory = tmp_path_factory.mktemp("other") / "other"
    save_checkpoint(directory, seed=77, scale=8.0)
    return directory


@pytest.fixture(scope="module")
def team(tiny_pair: TinyPair, other: Path) -> Engine:
    return Engine.from_pretrained([tiny_pair.teacher, other], tiny_pair.student, memory_bytes=1 << 24)


def config_for(pair: TinyPair, other: Path, data: Path, out: Path, **changes: Any) -> SelectConfig:
    return SelectConfig(
        teacher=(str(pair.teacher), str(other)), student=str(pair.student), data=str(data), output_dir=str(out),
        memory_bytes=1 << 24, sampling=Sampling(), **{**SEARCH, **changes},
    )  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: int(row["index"]))


def without_times(value: Any) -> Any:
    """A row without what differs from run to run."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in VARYING}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def test_rows_log_and_summary_say_who_won(
    tiny_pair: TinyPair, other: Path, team: Engine, write_rows: Write, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = config_for(tiny_pair, other, write_rows(PROMPTS), run, drop_teacher_after=2)
    summary = run_select(config, team)
    names = [str(tiny_pair.teacher), str(other)]
    written = json.loads((run / "summary.json").read_text())["teachers"]
    selections, decisions = lines(run / "selections.jsonl"), lines(run / "decisions.jsonl")
    assert [one.name for one in summary.teachers] == [one["name"] for one in written] == names
    assert [one["fingerprint"] for one in written] == [one.fingerprints["teacher"] for one in team.teachers]
    for index, total in enumerate(written):
        uses = [row["teachers"][index] for row in selections]
        for name in ("decisions", "wins", "tokens_sampled", "tokens_kept"):
            assert total[name] == sum(use[name] for use in uses)
        assert total["seconds"] == pytest.approx(sum(use["seconds"] for use in uses))
        assert total["dropped"] == sum(use["dropped_after"] is not None for use in uses)
        candidates = [c for row in decisions for c in row["candidates"] if c["teacher"] == index]
        assert total["tokens_sampled"] == sum(len(c["token_ids"]) for c in candidates)
        assert total["wins"] == sum(c["verdict"] == "kept" for c in candidates)
        kept = [c["tokens"] for row in selections for c in row["chunks"] if c["teacher"] == names[index]]
        assert total["tokens_kept"] == sum(kept)
    assert all(total["wins"] for total in written), "one of the teachers never won"
    assert any(total["dropped"] for total in written)
    for row, decided in zip(selections, decisions, strict=True):
        assert row["teacher"]["name"] == " + ".join(names)
        assert len(row["teacher_logprobs"]) == len(row["completion_ids"])
        kept_by = [c["teacher"] for c in decided["candidates"] if c["verdict"] == "kept"]
        assert [names[i] for i in kept_by] == [chunk["teacher"] for chunk in row["chunks"]]
        assert [r["teachers"] for r in decided["rounds"]] == [
            sorted({c["teacher"] for c in decided["candidates"] if len(c["trace"]) - 1 == r["round"]})
            for r in decided["rounds"]
        ]
        assert without_times(decided["teachers"]) == [
            {name: value for name, value in without_times(use).items() if name not in ("name", "fingerprint")}
            for use in row["teachers"]
        ]
    # the page says who wrote a box
    page = read_page(run_report(ReportConfig(run=(str(run),), output=str(tmp_path / "page.html"))).path)
    assert page["overview"]["searches"][0]["teachers"] == names
    trees = {entry["index"]: tree for entry, tree in list_trees(page)}
    for decided in decisions:
        boxes = trees[decided["index"]]["boxes"]
        assert [(tuple(box["trace"]), box["writer"]) for box in boxes] == [
            (tuple(c["trace"]), c["teacher"]) for c in decided["candidates"]
        ]
    # the log is enough to judge again: the run's own criterion makes the run's choices
    again = run_reselect(ReselectConfig(run=str(run), output_dir=str(tmp_path / "again")))
    assert (again.differing, again.largest_change) == (0, pytest.approx(0.0, abs=1e-4))
    # `random` depends on the streams of the candidates, which follow from the log
    drawn = config_for(tiny_pair, other, write_rows(PROMPTS), tmp_path / "drawn", criterion="random")
    run_select(drawn, team)
    random = run_reselect(ReselectConfig(run=str(tmp_path / "drawn"), output_dir=str(tmp_path / "drawn again")))
    assert (random.differing, random.largest_change) == (0, 0.0)


def test_a_stopped_run_goes_on_and_other_teachers_are_refused(
    tiny_pair: TinyPair, other: Path, team: Engine, write_rows: Write, tmp_path: Path
) -> None:
    whole = config_for(tiny_pair, other, write_rows(PROMPTS), tmp_path / "whole", teacher_topk=2)
    summary = run_select(whole, team)
    narrow = Engine.from_pretrained(list(whole.teacher), tiny_pair.student, memory_bytes=1 << 24, max_num_seqs=4)
    config = dataclasses.replace(whole, output_dir=str(tmp_path / "run"), total_budget=Budget(tokens=150))
    part = run_select(config, narrow)
    assert 0 < part.prompts < 4
    again = dataclasses.replace(config, resume=True, total_budget=Budget())
    for teachers in (whole.teacher[::-1], str(tiny_pair.teacher), (str(tiny_pair.teacher), str(tiny_pair.student))):
        with pytest.raises(InputError, match="was begun with teacher="):
            run_select(dataclasses.replace(again, teacher=teachers))
    resumed = run_select(again, narrow)
    for file in ("selections.jsonl", "decisions.jsonl"):
        rows, expected = (lines(tmp_path / run / file) for run in ("run", "whole"))
        for row in (*rows, *expected):
            row.pop("teacher_topk", None)
        assert without_times(rows) == without_times(expected)
    assert [one.wins for one in resumed.teachers] == [one.wins for one in summary.teachers]


def test_the_top_k_of_each_chunk_is_its_teachers(
    tiny_pair: TinyPair, other: Path, team: Engine, write_rows: Write, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_select(config_for(tiny_pair, other, write_rows(PROMPTS), run, teacher_topk=3), team)
    read = read_examples(
        [run / "selections.jsonl"], team.tokenizer("student"), max_length=512, statuses=("finished", "length")
    )
    rows = [json.loads(line) for line in (run / "selections.jsonl").read_text().splitlines()]
    names = [one["name"] for one in rows[0]["teachers"]]
    writers = set()
    for row, example in zip(rows, read.examples, strict=True):
        assert example.topk is not None
        top, start = example.topk.read(), 0
        for chunk in row["chunks"]:
            writer = names.index(chunk["teacher"])
            writers.add(writer)
            (stats,) = team.teachers[writer].score([row["prompt_ids"]], [row["completion_ids"]], model="teacher")
            for t in range(start, start + chunk["tokens"]):
                place = (top.ids[t] == row["completion_ids"][t]).nonzero()
                if len(place):  # the teacher that wrote the chunk gave the token this probability
                    assert float(top.logprob[t, place[0, 0]]) == pytest.approx(
                        float(stats.logprob[t]), rel=1 / 2048, abs=1e-4
                    )
                assert row["teacher_logprobs"][t] == pytest.approx(float(stats.logprob[t]), abs=1e-4)
            start += chunk["tokens"]
    assert writers == {0, 1}
    for name, options in (("rows", {}), ("memory", {"teacher_model_name_or_path": str(other)})):
        trained = run_train(
            TrainConfig(
                model_name_or_path=str(tiny_pair.student), data=(str(run / "selections.jsonl"),), kd_ratio=0.5,
                output_dir=str(tmp_path / name), per_device_train_batch_size=2, max_steps=1, **options,
            )
        )  # fmt: skip
        assert math.isfinite(trained.loss)


def test_the_command_prints_each_teacher(
    tiny_pair: TinyPair, other: Path, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(PROMPTS[:2])
    models = ["--teacher", str(tiny_pair.teacher), str(other), "--student", str(tiny_pair.student)]
    search = ["--candidates", "2", "--chunk.tokens", "4", "--chunk.until", "None", "--max-tokens", "8"]
    common = ["--data", str(data), "--memory-bytes", str(1 << 24)]
    main(["select", *models, *common, *search, "--output-dir", str(tmp_path / "run")])
    said = capsys.readouterr().out
    for name in (tiny_pair.teacher, other):
        assert f"teacher {name}: won " in said
    assert " sampled, " in said
    for flags, message in (
        (["generate", *models[:3], *common], "several teachers compete in `genssd select` alone"),
        (["select", *models, *common, "--generation-config"], "generation_config is one model's own sampling"),
        (["select", *models[:1], models[1], models[1], *models[3:], *common], "is given twice"),
        (["select", *models[:2], *models[3:], *common, "--on-unlearnable", "ask_teacher"], "needs several teachers"),
        (["select", *models[:2], *models[3:], *common, "--drop-teacher-after", "2"], "needs several teachers"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*flags, "--output-dir", str(tmp_path / "refused")])
        assert stop.value.code in (1, 2)
        assert message in capsys.readouterr().err
    assert not (tmp_path / "refused" / "run.json").exists()


def test_one_teacher_in_a_list_is_one(tiny_pair: TinyPair, other: Path, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(PROMPTS[:1])
    config = config_for(tiny_pair, other, data, tmp_path / "run")
    assert dataclasses.replace(config, teacher=(str(other),)).teacher == str(other)
    assert GenerateConfig(teacher=str(other), data=str(data)).teacher == str(other)


def test_the_doctor_examines_every_teacher(tiny_pair: TinyPair, other: Path, write_rows: Write, tmp_path: Path) -> None:
    config = config_for(tiny_pair, other, write_rows(PROMPTS), tmp_path / "run")
    findings = {finding.name: finding for finding in examine(read_settings("select", config), rows=4)}
    assert findings["teacher 2"].level == "ok"
    assert "own decoder" in findings["teacher 2"].line
    assert "the tokens of the other models" in findings["tokenizers of teacher 2"].line
    assert "teacher 2 " in findings["memory of the engine"].line
    lost = tmp_path / "lost"
    shutil.copytree(other, lost)
    (lost / "tokenizer.json").unlink()
    (lost / "tokenizer_config.json").unlink()
    config = config_for(tiny_pair, lost, write_rows(PROMPTS), tmp_path / "run")
    findings = {finding.name: finding for finding in examine(read_settings("select", config), rows=4)}
    assert findings["teacher 2"].level == "error"


def test_prompts_that_the_student_would_read_twice_are_left_out(
    tiny_pair: TinyPair, other: Path, write_rows: Write, tmp_path: Path
) -> None:
    thinking = tmp_path / "thinking"
    shutil.copytree(other, thinking)
    template = (thinking / "chat_template.jinja").read_text()
    opened = template.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    assert opened != template
    (thinking / "chat_template.jinja").write_text(opened)
    engine = Engine.from_pretrained([tiny_pair.teacher, thinking], tiny_pair.student, memory_bytes=1 << 22)
    chat = [{"role": "user", "content": "1+1?"}]
    with pytest.raises(InputError, match="prompt 0: beside teacher 2 the student reads another prompt"):
        engine.select_expand([chat], **SEARCH)
    data = write_rows([{"messages": chat}, {"prompt": "text alone"}])
    summary = run_select(config_for(tiny_pair, thinking, data, tmp_path / "run"), engine)
    assert summary.prompts == 1
    (fault,) = summary.bad_rows
    assert "line 1" in fault
    assert "beside teacher 2 the student reads another prompt" in fault
