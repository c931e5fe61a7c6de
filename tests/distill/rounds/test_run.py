"""`genssd distill`: rounds of selecting and training, interrupted anywhere."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair
from support.training_runs import weights

from genssd.distill.answers.forms import CORRECT, WRONG, Verdict, undecidable
from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.rounds import run as rounds
from genssd.distill.rounds import training as round_training
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.rounds.run import RoundSummary, run_distill
from genssd.distill.select.config import SelectSettings
from genssd.distill.train.config import TrainSettings
from genssd.engine.checkpoints.checkpoint import fingerprint
from genssd.engine.common.errors import CapacityError, CheckpointError, InputError
from genssd.engine.decoding.chunk import Chunk

Write = Callable[..., Path]
SELECT = SelectSettings(candidates=2, chunk=Chunk(tokens=3, until=None), max_tokens=6, memory_bytes=1 << 22)
TRAIN = TrainSettings(
    per_device_train_batch_size=2, learning_rate=1e-3, statuses=("finished", "length"), save_steps=1, logging_steps=1
)
ROWS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(5)]


def config_for(pair: TinyPair, data: Path, out: Path, **options: Any) -> DistillConfig:
    base = DistillConfig(
        teacher=str(pair.teacher), student=str(pair.student), data=str(data), output_dir=str(out), select=SELECT,
        train=TRAIN, require_correct=False,
    )  # fmt: skip
    return dataclasses.replace(base, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(write_rows: Write) -> Path:
    return write_rows(ROWS)


def test_the_trained_student_chooses_in_the_next_round(tiny_pair: TinyPair, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first, second = run_distill(
        config_for(tiny_pair, data, out, eval_data=str(data), eval_limit=2, allow_eval_overlap=True)
    )
    assert (first.round, second.round) == (1, 2)
    assert first.student == str(out / "round-1" / "train")
    for number, student in ((1, tiny_pair.student), (2, Path(first.student))):
        rows = lines(out / f"round-{number}" / "select" / "selections.jsonl")
        assert {row["student"]["fingerprint"] for row in rows} == {fingerprint(student)}
        assert {row["seed"] for row in rows} == {number - 1}
    assert (out / "round-0" / "evaluate" / "summary.json").exists()
    assert first.accuracy is not None
    assert [row["round"] for row in lines(out / "rounds.jsonl")] == [1, 2]
    kept = lines(out / "round-2" / "kept.jsonl")
    assert second.kept == len(kept) == 5
    assert second.mean_score == pytest.approx(sum(row["score"] for row in kept) / 5)


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DistillConfig, list[RoundSummary]]:
    """Return the config and the rounds of a run of two threads."""
    root = tmp_path_factory.mktemp("uninterrupted")
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = config_for(tiny_pair, root / "data.jsonl", root / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        return config, list(run_distill(config))


@pytest.mark.parametrize("torn", ["select", "train", "after training", "between rounds"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    uninterrupted: tuple[DistillConfig, list[RoundSummary]],
    tmp_path: Path,
    torn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    whole, expected = uninterrupted
    out = tmp_path / "torn"
    config = dataclasses.replace(whole, output_dir=str(out))
    run = run_distill(config)
    next(run)
    if torn == "between rounds":
        run.close()
    else:
        module, name = (rounds, "run_select") if torn == "select" else (round_training, "run_train")
        real = getattr(module, name)

        def dies(*arguments: Any, **options: Any) -> None:
            real(*arguments, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, name, dies)
        with pytest.raises(KeyboardInterrupt):
            next(run)
        monkeypatch.undo()
    second = out / "round-2"
    if torn == "select":
        path = second / "select" / "selections.jsonl"
        path.write_bytes(path.read_bytes()[:-100])
    if torn == "train":
        (second / "train" / "model.safetensors").unlink()
        shutil.rmtree(second / "train" / "checkpoint-3")
    with pytest.raises(InputError, match="pass --resume"):
        list(run_distill(config))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the trainings keep the number that the run was begun with
    resumed = list(run_distill(dataclasses.replace(config, resume=True)))
    assert [strip(summary) for summary in resumed] == [strip(summary) for summary in expected]
    for record in out.glob("round-*/train/run.json"):
        assert json.loads(record.read_text())["config"]["threads"] == 2
    one, other = weights(Path(whole.output_dir) / "round-2" / "train"), weights(second / "train")
    assert all(torch.equal(one[name], other[name]) for name in one)


def strip(summary: RoundSummary) -> RoundSummary:
    return dataclasses.replace(summary, student="")


def test_more_rounds_may_be_added_but_nothing_else_changes(tiny_pair: TinyPair, data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_pair, data, tmp_path / "run", rounds=1, resume=True)
    (first,) = run_distill(config)
    again = list(run_distill(dataclasses.replace(config, rounds=2)))
    assert len(again) == 2
    assert again[0] == first
    changed = dataclasses.replace(config, train=dataclasses.replace(TRAIN, learning_rate=2e-3))
    with pytest.raises(InputError, match=r"begun with train\.learning_rate=0\.001, not 0\.002"):
        list(run_distill(changed))
    data.write_text(data.read_text() + '{"question": "more?"}\n')
    with pytest.raises(InputError, match="begun with data='"):
        list(run_distill(config))


def test_what_was_wrong_may_be_put_right(tiny_pair: TinyPair, data: Path, tmp_path: Path) -> None:
    """Memory at any time, the training's options until there is a training."""
    config = config_for(tiny_pair, data, tmp_path / "run", rounds=1)
    small = dataclasses.replace(SELECT, memory_bytes=1 << 15)
    with pytest.raises(CapacityError, match="raise memory_bytes"):
        list(run_distill(dataclasses.replace(config, select=small)))
    wrong = dataclasses.replace(TRAIN, use_peft=True, lora_target_modules=("nope",))
    with pytest.raises(InputError, match="no module is called 'nope'"):
        list(run_distill(dataclasses.replace(config, train=wrong, resume=True)))
    logging = dataclasses.replace(TRAIN, logging_steps=3)
    (summary,) = run_distill(dataclasses.replace(config, train=logging, resume=True))
    assert summary.kept == 5
    for train, message in (
        ({"teacher_model_name_or_path": "/nope", "kd_ratio": 0.5}, "/nope does not exist"),
        ({"eval_data": ("/nope.jsonl",)}, r"/nope\.jsonl cannot be read"),
    ):
        early = dataclasses.replace(config, train=dataclasses.replace(TRAIN, **train), output_dir=str(tmp_path / "no"))  # type: ignore[arg-type]
        with pytest.raises((InputError, CheckpointError), match=message):
            list(run_distill(early))
        assert not (tmp_path / "no").exists()
    with pytest.raises(
        InputError, match=r"train\.fsdp shards the model over several processes: give processes or devices"
    ):
        dataclasses.replace(config, train=dataclasses.replace(TRAIN, fsdp=True))
    with pytest.raises(InputError, match="there is no finishd"):
        dataclasses.replace(TRAIN, statuses=("finishd",))


def test_questions_of_the_evaluation_data_are_refused_before_anything_is_done(
    tiny_pair: TinyPair, data: Path, write_rows: Write, tmp_path: Path
) -> None:
    exam = write_rows([{"question": "x"}, {"question": " 3 + 3", "answer": "6"}], "exam.jsonl")
    for options in ({"eval_data": str(exam)}, {"train": dataclasses.replace(TRAIN, eval_data=(str(exam),))}):
        config = config_for(tiny_pair, data, tmp_path / "run", **options)
        with pytest.raises(
            InputError, match=r"of 1 of 5 rows .*, 0 exactly and 1 with .*\n .*line 4 = .*exam.*line 2$"
        ):
            next(run_distill(config))
    assert not (tmp_path / "run").exists()
    # a limit leaves the question out
    next(
        run_distill(config_for(tiny_pair, write_exam(write_rows), tmp_path / "few", eval_data=str(data), eval_limit=1))
    )


def write_exam(write_rows: Write) -> Path:
    return write_rows([{"question": "1+1?", "answer": "2"}], "one.jsonl")


def test_a_round_renders_chats_as_the_run_does(
    tiny_pair: TinyPair, data: Path, write_rows: Write, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    exam = write_rows([{"question": "9+9?", "answer": "18"}, {"question": "0+0?", "answer": "0"}], "exam.jsonl")
    config = config_for(
        tiny_pair, data, out, rounds=1, eval_data=str(exam), allow_eval_overlap=True, system_prompt="Be brief.",
        template_date="2026-11-26", special_tokens_in_text=True,
    )  # fmt: skip
    list(run_distill(config))
    assert json.loads((out / "summary.json").read_text())["eval_overlap"] == {"rows": 5, "exact": 1, "near": 0}
    for part in ("round-0/evaluate", "round-1/select", "round-1/train", "round-1/evaluate"):
        record = json.loads((out / part / "run.json").read_text())
        assert record["template_date"] == "2026-11-26"
        assert record["config"]["system_prompt"] == "Be brief."
        assert record["config"]["special_tokens_in_text"]
    (row, *_) = lines(out / "round-1" / "select" / "selections.jsonl")
    assert row["messages"][0] == {"role": "system", "content": "Be brief."}
    (result, *_) = lines(out / "round-1" / "evaluate" / "evaluation.jsonl")
    decode = tiny_pair.engine.tokenizer("student").hf.decode
    assert decode(result["prompt_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n9+9?")


def test_a_finished_training_is_not_done_again(
    tiny_pair: TinyPair, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = dataclasses.replace(TRAIN, save_steps=None)
    config = config_for(
        tiny_pair,
        data,
        tmp_path / "run",
        rounds=1,
        eval_data=str(data),
        eval_limit=2,
        allow_eval_overlap=True,
        train=train,
    )
    real = rounds.run_evaluate
    monkeypatch.setattr(
        rounds, "run_evaluate", lambda c, report: real(c, report=report) if "round-0" in c.output_dir else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        list(run_distill(config))
    monkeypatch.undo()
    monkeypatch.setattr(round_training, "run_train", None)
    (summary,) = run_distill(dataclasses.replace(config, resume=True))
    assert summary.accuracy is not None
    run = json.loads((tmp_path / "run" / "round-1" / "evaluate" / "summary.json").read_text())
    assert run["config"]["max_tokens"] == SELECT.max_tokens


def test_problems_start_again_at_the_end_and_statuses_count(tiny_pair: TinyPair, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    list(run_distill(config_for(tiny_pair, data, out, prompts_per_round=3)))
    assert [r["question"] for r in lines(out / "round-2" / "problems.jsonl")] == ["3+3?", "4+4?", "0+0?"]
    only = dataclasses.replace(TRAIN, statuses=("finished",))
    with pytest.raises(InputError, match="no trajectory is left"):
        list(run_distill(config_for(tiny_pair, data, tmp_path / "other", train=only)))


def test_right_answers_are_kept(
    tiny_pair: TinyPair, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdicts are those that the selection has written: nothing is judged a second time."""
    real, judged = rounds.run_select, []

    def judge(self: AnswerJudge, prompt_ids: object, response_ids: object, answer: str) -> Verdict:
        judged.append(answer)
        return CORRECT if answer in ("2", "4") else undecidable("why") if answer == "6" else WRONG

    def select(*arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(AnswerJudge, "judge", judge)
            return real(*arguments, **options)

    monkeypatch.setattr(AnswerJudge, "judge", None)
    monkeypatch.setattr(rounds, "run_select", select)
    out = tmp_path / "run"
    (summary,) = run_distill(config_for(tiny_pair, data, out, rounds=1, require_correct=True))
    assert summary.kept == 2
    assert summary.left_out == {"wrong": 2, "undecided": 1}
    assert {row["answer"] for row in lines(out / "round-1" / "kept.jsonl")} == {"2", "4"}
    assert sorted(judged) == ["0", "2", "4", "6", "8"]


def test_bad_rows_are_reported_and_the_others_trained_on(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AnswerJudge, "judge", lambda *arguments: CORRECT)
    data = write_rows(
        [
            {"question": "1+1?", "answer": "2"},
            {"question": "why?"},
            {"question": 3, "answer": "3"},
            {"question": "long " * 400, "answer": "4"},
            {"question": "2+2?", "answer": "4"},
        ]
    )
    data.write_text("{\n" + data.read_text())
    exam = write_rows([{"question": "5+5?", "answer": "10"}, {"question": "6+6?"}], "exam.jsonl")
    config = config_for(
        tiny_pair, data, tmp_path / "run", require_correct=True, prompts_per_round=2, rounds=2, eval_data=str(exam)
    )
    first, second = run_distill(config)
    assert [(summary.prompts, summary.kept) for summary in (first, second)] == [(1, 1), (2, 2)]
    expected = [
        r"data\.jsonl, line 1: not valid JSON",
        r"data\.jsonl, line 3: no reference answer, .* --no-require-correct",
        r"data\.jsonl, line 4: question must be text",
        r"data\.jsonl, line 5: .* tokens",
        r"exam\.jsonl, line 2: no answer",
    ]
    bad_rows = (tmp_path / "run" / "bad_rows.txt").read_text().splitlines()
    assert len(bad_rows) == len(expected)
    for text in expected:
        assert any(re.search(text, row) for row in bad_rows), (text, bad_rows)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bad_rows"] == 5
    assert list(run_distill(dataclasses.replace(config, resume=True))) == [first, second]
    assert (tmp_path / "run" / "bad_rows.txt").read_text().splitlines() == bad_rows


def test_data_without_a_usable_row_are_refused_before_anything_is_done(
    tiny_pair: TinyPair, data: Path, write_rows: Write, tmp_path: Path
) -> None:
    why = write_rows([{"question": "why?"}], "why.jsonl")
    with pytest.raises(
        InputError, match=r"1 row, none of which can be used:\n .*why\.jsonl, line 1: no reference answer"
    ):
        list(run_distill(config_for(tiny_pair, why, tmp_path / "run", require_correct=True)))
    with pytest.raises(InputError, match=r"1 row, none of which can be used:\n .*why\.jsonl, line 1: no answer"):
        list(run_distill(config_for(tiny_pair, data, tmp_path / "run", eval_data=str(why))))
    assert not (tmp_path / "run").exists()


def test_restarting_trains_the_first_student_on_everything(tiny_pair: TinyPair, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    list(run_distill(config_for(tiny_pair, data, out, restart=True, prompts_per_round=2)))
    problems = [[row["question"] for row in lines(out / f"round-{n}" / "problems.jsonl")] for n in (1, 2)]
    assert problems == [["0+0?", "1+1?"], ["2+2?", "3+3?"]]
    run = json.loads((out / "round-2" / "train" / "run.json").read_text())["config"]
    assert run["model_name_or_path"] == str(tiny_pair.student)
    assert [Path(path).parent.name for path in run["data"]] == ["round-1", "round-2"]
    assert {row["student"]["fingerprint"] for row in lines(out / "round-2" / "select" / "selections.jsonl")} == {
        fingerprint(out / "round-1" / "train")
    }


def test_the_top_k_of_the_selection_are_learnt_from(tiny_pair: TinyPair, data: Path, tmp_path: Path) -> None:
    select, train = dataclasses.replace(SELECT, teacher_topk=4), dataclasses.replace(TRAIN, kd_ratio=0.5)
    (only,) = run_distill(config_for(tiny_pair, data, tmp_path / "run", rounds=1, select=select, train=train))
    logged = lines(Path(only.student) / "metrics.jsonl")
    assert all(row["divergence"] > 0 for row in logged)
    with pytest.raises(InputError, match=r"give --select\.teacher-topk"):
        config_for(tiny_pair, data, tmp_path / "no", train=train)


def test_the_hidden_states_of_the_selection_are_learnt_from(tiny_pair: TinyPair, data: Path, tmp_path: Path) -> None:
    select = dataclasses.replace(SELECT, teacher_states="bfloat16")
    train = dataclasses.replace(TRAIN, kd_ratio=0.5, kd_states=True, teacher_model_name_or_path=str(tiny_pair.teacher))
    (only,) = run_distill(config_for(tiny_pair, data, tmp_path / "run", rounds=1, select=select, train=train))
    logged = lines(Path(only.student) / "metrics.jsonl")
    assert all(row["divergence"] > 0 for row in logged)
    with pytest.raises(InputError, match=r"give --select\.teacher-states"):
        config_for(tiny_pair, data, tmp_path / "no", train=train)
    other = dataclasses.replace(train, teacher_model_name_or_path=str(tiny_pair.student))
    with pytest.raises(InputError, match=r"the head of the teacher that writes: give its name as train\.teacher_model"):
        config_for(tiny_pair, data, tmp_path / "no", select=select, train=other)


def test_wrong_answers_are_left_out(tiny_pair: TinyPair, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"round 1: no trajectory is left to train on .*--no-require-correct"):
        list(run_distill(config_for(tiny_pair, data, tmp_path / "run", require_correct=True)))
