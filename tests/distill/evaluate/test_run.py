"""Evaluation: results, files, interruptions, and problems that do not fit."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.progress import Recorder
from support.tiny_pair import TinyPair
from support.toys import VOCAB, save_markov, token_of

from genssd import Sampling
from genssd.cli import main
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import run_evaluate
from genssd.distill.runs.progress import Progress
from genssd.engine.common.errors import CapacityError, InputError

Write = Callable[..., Path]


def test_a_model_whose_answers_are_known(tmp_path: Path, write_rows: Write) -> None:
    """A chain that writes 3 after any prompt with probability 3/4, else 7, and then ends."""
    letters = [token_of("="), token_of("3"), token_of("7"), VOCAB - 3]
    logits = torch.full((4, 4), -50.0)
    logits[0, 1], logits[0, 2] = math.log(0.75), math.log(0.25)
    logits[1, 3] = logits[2, 3] = 0.0
    save_markov(tmp_path / "model", letters, logits)
    data = write_rows([{"prompt": "1+2=", "answer": "3"}, {"prompt": "3+4=", "answer": "7"}] * 20)
    config = EvaluateConfig(
        model=str(tmp_path / "model"),
        data=str(data),
        output_dir=str(tmp_path / "run"),
        samples=40,
        sampling=Sampling(),
        max_tokens=4,
        memory_bytes=1 << 22,
    )
    progress = Recorder()
    result = run_evaluate(config, report=progress)
    assert result.accuracy.value == 0.5
    assert result.correct == (True, False) * 20
    assert result.mean_tokens == 2.0
    assert result.unfinished == 0
    assert result.avg_at_k is not None
    assert result.avg_at_k.value == pytest.approx(0.5, abs=0.05)
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    shares = [np.mean([s["correct"] for s in row["samples"]]) for row in rows]
    assert np.mean(shares[0::2]) == pytest.approx(0.75, abs=0.06)
    assert rows[0]["response"] == "3"
    assert result.undecided == 0
    assert rows[0]["undecided"] is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"]["value"] == 0.5
    assert progress.stages == [f"loading student {config.model}", ""]
    assert progress.counts == [(done, 40) for done in range(1, 41)]


def test_responses_that_cannot_be_judged_are_counted(tmp_path: Path, write_rows: Write) -> None:
    letters = [token_of("="), token_of("3"), VOCAB - 3]
    logits = torch.full((3, 3), -50.0)
    logits[0, 1] = logits[1, 2] = 0.0
    save_markov(tmp_path / "model", letters, logits)
    data = write_rows([{"prompt": "1+2=", "answer": "3"}, {"prompt": "1+2=", "answer": "B"}])
    config = EvaluateConfig(
        model=str(tmp_path / "model"),
        data=str(data),
        output_dir=str(tmp_path / "run"),
        max_tokens=4,
        memory_bytes=1 << 22,
    )
    result = run_evaluate(config)
    assert (result.correct, result.undecided) == ((True, False), 1)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["undecided"] == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert rows[1]["undecided"] == "the reference is the letter of an option, the response gives something else"


def test_rows_need_answers(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """A row without one, or that cannot be read, is named; the others are evaluated, and a mended one by resuming."""
    rows = [{"prompt": "b"}, {"prompt": "a", "answer": "1"}, {"x": 1, "answer": "1"}]
    with pytest.raises(
        InputError, match=r"1 row, none of which can be used:\n .*, line 1: no answer; a row needs answer"
    ):
        run_evaluate(config_for(tiny_pair, write_rows(rows[:1]), tmp_path / "none"))
    config = config_for(tiny_pair, write_rows(rows), tmp_path / "run")
    result = run_evaluate(config)
    assert len(result.correct) == 1
    first, second = result.not_evaluated
    assert "line 1: no answer" in first
    assert "line 3: no prompt" in second
    write_rows([{"prompt": "b", "answer": "2"}, *rows[1:]])
    assert len(run_evaluate(dataclasses.replace(config, resume=True)).correct) == 2
    lines = (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1]


PROBLEMS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(7)]


def config_for(pair: TinyPair, data: Path, output_dir: Path, **changes: Any) -> EvaluateConfig:
    base = EvaluateConfig(
        model=str(pair.student), data=str(data), output_dir=str(output_dir), samples=2, max_tokens=12, max_num_seqs=5,
        memory_bytes=1 << 22,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def files(output_dir: Path) -> dict[str, bytes]:
    """The results, without the name of the directory."""
    summary = json.loads((output_dir / "summary.json").read_text())
    for name in ("output_dir", "resume", "data", "limit"):
        del summary["config"][name]
    return {"rows": (output_dir / "evaluation.jsonl").read_bytes(), "summary": json.dumps(summary).encode()}


def test_an_interrupted_evaluation_ends_with_the_same_files(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    """Stopped after every problem in turn, with the start of a line that was being written."""
    data = write_rows(PROBLEMS)
    run_evaluate(config_for(tiny_pair, data, tmp_path / "whole"))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "evaluation.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(7))
    assert all(len(row["samples"]) == 2 for row in rows)
    out = tmp_path / "stopped"
    config = config_for(tiny_pair, data, out)

    class StoppedError(Exception):
        pass

    class Stopping(Progress):
        def __call__(self, done: float, total: float, detail: str = "") -> None:
            assert (done, total) == (before + 1, 7)
            raise StoppedError

    for before in range(7):
        with pytest.raises(StoppedError):
            run_evaluate(dataclasses.replace(config, resume=before > 0), report=Stopping())
        journal = out / "evaluation.jsonl"
        assert len(journal.read_text().splitlines()) == before + 1, "a problem is on disk as soon as it is reported"
        journal.write_bytes(journal.read_bytes() + b'{"prompt": "3+')
    with pytest.raises(InputError, match="pass --resume"):
        run_evaluate(config)
    run_evaluate(dataclasses.replace(config, resume=True))
    assert files(out) == files(tmp_path / "whole")
    run_evaluate(dataclasses.replace(config, resume=True))  # a finished run is summed up again
    assert files(out) == files(tmp_path / "whole")


def test_results_do_not_depend_on_the_batch(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(PROBLEMS)
    run_evaluate(config_for(tiny_pair, data, tmp_path / "five"))
    run_evaluate(config_for(tiny_pair, data, tmp_path / "all", max_num_seqs=64))
    assert files(tmp_path / "five")["rows"] == files(tmp_path / "all")["rows"]
    run_evaluate(config_for(tiny_pair, data, tmp_path / "greedy", samples=0))
    for name in ("response", "correct", "tokens"):
        one, other = (
            [json.loads(line)[name] for line in (tmp_path / run / "evaluation.jsonl").read_text().splitlines()]
            for run in ("five", "greedy")
        )
        assert one == other


def test_a_file_that_has_grown_is_resumed_and_another_one_refused(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    config = config_for(tiny_pair, write_rows(PROBLEMS[:4]), tmp_path / "run")
    run_evaluate(config)
    first = (tmp_path / "run" / "evaluation.jsonl").read_bytes()
    write_rows(PROBLEMS)
    resumed = dataclasses.replace(config, resume=True)
    assert len(run_evaluate(resumed).correct) == 7
    assert (tmp_path / "run" / "evaluation.jsonl").read_bytes().startswith(first)
    with pytest.raises(InputError, match=r"begun with samples=2, not 3"):
        run_evaluate(dataclasses.replace(resumed, samples=3))
    write_rows([*PROBLEMS[:2], {"prompt": "other", "answer": "1"}, *PROBLEMS[3:]])
    with pytest.raises(InputError, match=r"is not the file that .* was begun with: row 2 differs"):
        run_evaluate(resumed)
    with pytest.raises(InputError, match="was begun with more rows than"):
        run_evaluate(dataclasses.replace(resumed, limit=2))


def test_a_problem_that_is_too_long_is_named_and_the_others_are_evaluated(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model has 512 positions; a cache of 1 << 18 bytes does not hold the second prompt."""
    long, middle = {"prompt": "1" * 600, "answer": "1"}, {"prompt": "1" * 400, "answer": "1"}
    data = write_rows([PROBLEMS[0], long, middle, PROBLEMS[1]])
    config = config_for(tiny_pair, data, tmp_path / "run")
    result = run_evaluate(config)
    assert len(result.correct) == 3
    (failure,) = result.not_evaluated
    assert failure.startswith(f"{data}, line 2: the prompt has 600 tokens; the student")
    assert (tmp_path / "run" / "bad_rows.txt").read_text() == f"{failure}\n"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["not_evaluated"] == [failure]
    small = ["--memory-bytes", str(1 << 17), "--max-tokens", "4", "--output-dir", str(tmp_path / "small")]
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--model", str(tiny_pair.student), "--data", str(data), *small])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert "greedy accuracy 0.0 % [0.0, 65.8] over 2 problems" in out
    assert "2 rows could not be evaluated; all others were:" in err
    assert f"{data}, line 3: " in err
    # with more memory, resuming evaluates it
    more = ["--memory-bytes", str(1 << 22), *small[2:], "--resume"]
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", str(tiny_pair.student), "--data", str(data), *more])
    assert "over 3 problems" in capsys.readouterr().out
    with pytest.raises(CapacityError, match=r"no problem of .* can be evaluated:\n .*line 1: the prompt has 600"):
        run_evaluate(config_for(tiny_pair, write_rows([long]), tmp_path / "none"))
