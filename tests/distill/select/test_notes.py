"""What rows of `select` and `generate` say of every response: verdict, what cut it off, log-probabilities.

Teacher and student are Markov chains over "7", "8" and the end, so that responses are numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_pair import TinyPair
from support.toys import EOS, edit_json, save_markov, token_of

from genssd import Chunk, Engine
from genssd.cli import main
from genssd.distill.answers.accuracy import describe_verdict
from genssd.distill.answers.intervals import wilson
from genssd.distill.answers.judge import AnswerJudge, judge
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.run import run_select
from genssd.engine.models.sampling import Sampling

Write = Callable[..., Path]
LETTERS = [token_of("7"), token_of("8"), EOS]
LOGITS = torch.tensor([[0.4, -1.0, 0.6], [0.6, 0.0, 0.3], [0.0, 0.0, 0.0]])
ROWS: list[dict[str, Any]] = [
    *({"prompt": "7", "answer": answer} for answer in ("7", "77", "7", "C", "78", "7", "C", "8", "C")),
    {"prompt": "87"},
]
"""Where the answer is the letter of an option, a response that gives a number cannot be judged."""
VERDICT = ("correct", "undecided")


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    root = tmp_path_factory.mktemp("chains")
    save_markov(root / "teacher", LETTERS, LOGITS, max_position_embeddings=64)
    save_markov(root / "student", LETTERS, LOGITS.roll(1, 1), max_position_embeddings=40)
    edit_json(root / "teacher" / "generation_config.json", temperature=0.5, top_k=2, repetition_penalty=1.05)
    engine = Engine.from_pretrained(root / "teacher", root / "student", dtype="float32", memory_bytes=1 << 22)
    return TinyPair(root / "teacher", root / "student", engine)


def run(command: str, chains: TinyPair, data: Path, out: Path, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    models = {"teacher": str(chains.teacher), "student": str(chains.student), "data": str(data), "output_dir": str(out)}
    settings: dict[str, Any] = {"max_tokens": 5, "seed": 1, **models, **options}
    summary: Any
    if command == "select":
        chunk = Chunk(tokens=1, until=None, shortest=0)
        summary = run_select(
            SelectConfig(candidates=3, beam=2, chunk=chunk, criterion="random", **settings), chains.engine
        )
    else:
        summary = run_generate(GenerateConfig(n=3, **settings), chains.engine)
    rows = [json.loads(line) for line in summary.path.read_text().splitlines()]
    return summary, sorted(rows, key=lambda row: row["index"])


def text_of(response: dict[str, Any]) -> str:
    completion = response["completion"]
    return str(completion if isinstance(completion, str) else completion[0]["content"])


@pytest.mark.parametrize("command", ["select", "generate"])
def test_every_response_has_a_verdict_and_what_cut_it(
    command: str, chains: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(ROWS)
    summary, rows = run(command, chains, data, tmp_path / "run")
    for row, problem in zip(rows, ROWS, strict=True):
        for response in (row, *row["others"]):
            text, answer = text_of(response), problem.get("answer")
            if answer is None:
                assert (response["correct"], response["undecided"]) == (None, None)
            elif answer == "C":
                assert {name: response[name] for name in VERDICT} == describe_verdict(judge(text, answer))
            else:
                assert (response["correct"], response["undecided"]) == (text == answer, None)
            assert response["cut_by"] == ("max_tokens" if response["status"] == "length" else None)
            (stats,) = chains.engine.score([row["prompt_ids"]], [response["completion_ids"]], model="teacher")
            assert response["teacher_logprobs"] == pytest.approx(stats.logprob.tolist(), abs=1e-5)
    counted = [[row] if command == "select" else [row, *row["others"]] for row in rows[:-1]]
    outcomes = [[response["correct"] is True for response in of_prompt] for of_prompt in counted]
    verdicts = [response for of_prompt in counted for response in of_prompt]
    accuracy = summary.accuracy
    assert accuracy.correct == sum(map(sum, outcomes)) > 0
    assert accuracy.undecided == sum(response["undecided"] is not None for response in verdicts) > 0
    assert accuracy.wrong == len(verdicts) - accuracy.correct - accuracy.undecided > 0
    assert accuracy.estimate.value == pytest.approx(sum(map(sum, outcomes)) / len(verdicts))
    if command == "select":
        assert accuracy.estimate == wilson([outcome for (outcome,) in outcomes])
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (written["correct"], written["wrong"]) == (accuracy.correct, accuracy.wrong)
    assert written["accuracy"]["value"] == accuracy.estimate.value
    # the verdicts are in the journal: a resumed run does not judge again
    monkeypatch.setattr(AnswerJudge, "judge", None)
    again, _ = run(command, chains, data, tmp_path / "run", resume=True)
    assert again.accuracy == accuracy


def test_positions_that_cut_responses_are_named_before_and_after(
    chains: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Responses without an end, after prompts that leave the student 3, 5 and 39 positions."""
    data = write_rows([{"prompt": "8" * 36 + "7"}, {"prompt": "8" * 34 + "7"}, {"prompt": "7"}, {"prompt": "8" * 60}])
    flags = ["select", "--teacher", chains.teacher, "--student", chains.student, "--data", data]
    more = ["--output-dir", tmp_path / "run", "--max-tokens", 30, "--chunk.tokens", 9, "--memory-bytes", 1 << 22]
    endless = tmp_path / "endless"
    save_markov(endless, LETTERS, LOGITS + torch.tensor([0.0, 0.0, -1e3]), max_position_embeddings=128)
    flags[2] = endless
    with pytest.raises(SystemExit):
        main([*map(str, flags), *map(str, more)])
    output = capsys.readouterr()
    warning = (
        "genssd: the student has 40 positions, of which the prompts take 35 to 37: fewer than max_tokens=30 are "
        "left for a response in 2 of 4 prompts; what is longer is cut off (status length)"
    )
    assert warning in output.err.splitlines()
    assert (
        "3 of 3 responses were cut off before they were finished: 1 by max_tokens (raise it), 2 at the last position "
        "of the student (shorten the prompts, or take a model with more)"
    ) in output.out
    rows = [json.loads(line) for line in (tmp_path / "run" / "selections.jsonl").read_text().splitlines()]
    cuts = {row["index"]: (row["cut_by"], len(row["completion_ids"])) for row in rows}
    assert cuts == {0: ("student positions", 3), 1: ("student positions", 5), 2: ("max_tokens", 30)}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["cuts"] == {
        "student positions": 2,
        "max_tokens": 1,
    }
    assert "line 4: the prompt has 60 tokens; the student" in output.err


def test_the_models_own_sampling_is_named_and_taken_on_request(
    chains: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(ROWS[:2])

    def generate(name: str, *more: str) -> tuple[str, dict[str, Any], list[str]]:
        flags = ["generate", "--teacher", chains.teacher, "--data", data, "--output-dir", tmp_path / name, *more]
        main([*map(str, flags), "--max-tokens", "5", "--memory-bytes", str(1 << 22), "--dtype", "float32"])
        settings = json.loads((tmp_path / name / "run.json").read_text())["settings"]
        responses = (tmp_path / name / "responses.jsonl").read_text().splitlines()
        return capsys.readouterr().err, settings, [text_of(json.loads(line)) for line in responses]

    hint = (
        "the teacher's generation_config.json recommends temperature 0.5, top_k 2; this run samples with temperature "
        "1, top_p 0.95; take the model's own with --generation-config"
    )
    assert hint in generate("default")[0]
    said, settings, texts = generate("own", "--generation-config")
    assert (
        "the teacher samples with temperature 0.5, top_k 2, by its generation_config.json; not implemented: "
        "repetition_penalty 1.05"
    ) in said
    names = ("temperature", "top_p", "top_k", "min_p")
    assert [settings[f"sampling.{name}"] for name in names] == [0.5, 1.0, 2, 0.0]
    assert settings["generation_config"] is True
    own = Sampling(temperature=0.5, top_k=2)
    assert texts == [c.text for (c,) in chains.engine.generate(["7", "7"], max_tokens=5, sampling=own)]
    said, _, by_hand = generate(
        "by hand", "--sampling.temperature", "0.5", "--sampling.top-p", "1", "--sampling.top-k", "2"
    )
    assert "recommends" not in said
    assert by_hand == texts
    for flags, message in (
        (["--generation-config", "--sampling.top-k", "3"], "give generation_config or options of sampling, not both"),
        (["--generation-config", "--teacher", str(chains.student)], "names none of temperature, top_p, top_k, min_p"),
    ):
        with pytest.raises(SystemExit):
            generate("refused", *flags)
        assert message in capsys.readouterr().err


def test_a_calibrated_threshold_is_printed_and_its_bad_rows_named(
    chains: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_rows([*({"prompt": "7"} for _ in range(4)), {"prompt": "8" * 70}, {"x": 1}], "held_out.jsonl")
    flags = ["select", "--teacher", chains.teacher, "--student", chains.student, "--data", write_rows(ROWS)]
    more = ["--output-dir", tmp_path / "run", "--max-tokens", 5, "--memory-bytes", 1 << 22, "--chunk.tokens", 2]
    words = [*map(str, [*flags, *more, "--calibrate.data", held_out, "--calibrate.share", "0.9"])]
    with pytest.raises(SystemExit):
        main(words)
    output = capsys.readouterr()
    fields = json.loads((tmp_path / "run" / "calibration.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    chunks = fields["chunks"]
    expected = (
        f"threshold {fields['threshold']:.6g}, which 90% of the teacher's {chunks} plain chunks of 4 prompts reach"
    )
    assert expected in output.out
    assert summary["threshold"] == fields["threshold"]
    assert math.isfinite(summary["threshold"])
    assert summary["bad_rows"] == 2
    assert f"{held_out}, line 5: the prompt has 70 tokens" in output.err
    assert f"{held_out}, line 6: no prompt" in output.err
    with pytest.raises(SystemExit):
        main([*words, "--resume"])  # the calibration is read again, its bad rows with it
    assert expected in capsys.readouterr().out
