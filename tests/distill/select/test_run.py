"""`genssd select`: what it writes, and that a crash at any point loses nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.progress import Recorder
from support.selections import PROMPTS, config_for
from support.tiny_pair import TinyPair

from genssd import Chunk, Engine
from genssd.distill.data.problems import read_problems
from genssd.distill.runs.directory import claim_directory
from genssd.distill.runs.run import Run
from genssd.distill.select.resuming import keep_complete
from genssd.distill.select.run import run_select
from genssd.engine.common.errors import InputError
from genssd.printing import describe_rounds

Write = Callable[..., Path]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_everything(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "2+2?"}]
    data = write_rows([{"question": "2+2?", "answer": "#### 4"}])
    summary = run_select(config_for(tiny_pair, data, tmp_path / "run", beam=2, candidates=3), tiny_pair.engine)
    (row,) = lines(tmp_path / "run" / "selections.jsonl")
    assert list(row)[:3] == ["messages", "prompt", "completion"]
    assert row["messages"][:-1] == row["prompt"] == asked
    assert row["messages"][-1:] == row["completion"]
    tokenizer = tiny_pair.engine.tokenizer("teacher")
    assert tokenizer.decode(row["completion_ids"]) == row["completion"][0]["content"]
    assert row["prompt_ids"] == row["student_prompt_ids"] == tokenizer.encode_prompt(asked)
    assert row["answer"] == "4"
    assert sum(chunk["tokens"] for chunk in row["chunks"]) == len(row["completion_ids"])
    assert row["teacher"] == {"name": str(tiny_pair.teacher), "fingerprint": tiny_pair.engine.fingerprints["teacher"]}
    assert row["source"] == {"file": str(data), "line": 1}
    assert row["seed"] == 0
    assert len(row["others"]) == 1
    assert (summary.prompts, summary.tokens_kept) == (1, len(row["completion_ids"]))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["candidates"] == 3


@pytest.mark.parametrize(("tokens", "rounds"), [(4, 4), (16, 1)])
def test_the_median_number_of_rounds_is_stated(
    tokens: int, rounds: int, tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    """A response that is one chunk was chosen as a whole, which the line says."""
    chunk = Chunk(tokens=tokens, until=None)
    summary = run_select(
        config_for(tiny_pair, write_rows(PROMPTS), tmp_path / "run", chunk=chunk, max_tokens=16), tiny_pair.engine
    )
    chunks = sorted(len(row["chunks"]) for row in lines(tmp_path / "run" / "selections.jsonl"))
    assert summary.median_chunks == np.median(chunks) == rounds
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["median_chunks"] == rounds
    assert ("--chunk.tokens" in describe_rounds(summary.median_chunks)) == (rounds == 1)


def test_the_decision_log_holds_every_candidate(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    run_select(config_for(tiny_pair, write_rows(PROMPTS), tmp_path / "run"), tiny_pair.engine)
    selections = lines(tmp_path / "run" / "selections.jsonl")
    decisions = lines(tmp_path / "run" / "decisions.jsonl")
    assert [row["index"] for row in selections] == [row["index"] for row in decisions]
    for selection, decision in zip(selections, decisions, strict=True):
        kept = [c for c in decision["candidates"] if c["verdict"] == "kept"]
        assert [token for c in kept for token in c["token_ids"]] == selection["completion_ids"]
        for candidate in decision["candidates"]:
            counts = {len(values) for values in candidate["student"].values()}
            assert counts == {len(candidate["token_ids"])} == {len(candidate["teacher_logprob"])}
        assert sum(len(c["token_ids"]) for c in decision["candidates"]) == selection["tokens_sampled"]
        # another criterion, or the same one, can be applied to what is written: the numbers are those of the engine
        (stats,) = tiny_pair.engine.score([selection["student_prompt_ids"]], [selection["completion_ids"]])
        written = np.array([value for c in kept for value in c["student"]["logprob"]], dtype=np.float32)
        np.testing.assert_allclose(written, stats.logprob.numpy(), atol=1e-5)
        first = decision["candidates"][0]
        if len(first["token_ids"]) > 2:
            assert first["score"] == pytest.approx(np.exp(-np.mean(first["student"]["logprob"])), rel=1e-5)


def test_a_second_run_needs_resume(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    config = config_for(tiny_pair, write_rows(PROMPTS), tmp_path / "run")
    run_select(config, tiny_pair.engine)
    with pytest.raises(InputError, match="holds finished work already; pass --resume"):
        run_select(config, tiny_pair.engine)
    before = (tmp_path / "run" / "selections.jsonl").read_bytes()
    run_select(dataclasses.replace(config, resume=True), tiny_pair.engine)
    assert (tmp_path / "run" / "selections.jsonl").read_bytes() == before


def test_resume_refuses_other_settings_data_and_models(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows(PROMPTS)
    config = config_for(tiny_pair, data, tmp_path / "run")
    run_select(config, tiny_pair.engine)
    record = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(InputError, match=r"begun with candidates=2, not 5"):
        run_select(dataclasses.replace(config, resume=True, candidates=5), tiny_pair.engine)
    swapped = Engine.from_pretrained(tiny_pair.student, tiny_pair.teacher, memory_bytes=1 << 24)
    with pytest.raises(InputError, match=r"begun with teacher='.*' \(\w{16}\), not '.*' \(\w{16}\)"):
        run_select(dataclasses.replace(config, resume=True), swapped)
    write_rows([{"prompt": "else"}, *PROMPTS[1:]])
    with pytest.raises(InputError, match=r"data\.jsonl is not the file .* row 0 differs"):
        run_select(dataclasses.replace(config, resume=True, max_num_seqs=7), tiny_pair.engine)
    assert (tmp_path / "run" / "run.json").read_bytes() == record


@pytest.mark.parametrize("file", ["selections.jsonl", "decisions.jsonl"])
def test_a_last_line_that_is_cut_is_done_again(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    rows = [{"prompt": "one"}, {"prompt": "two"}]
    data = write_rows(rows)
    config = config_for(tiny_pair, data, tmp_path / "run", max_tokens=1, candidates=1)
    run_select(config, tiny_pair.engine)
    paths = [tmp_path / "run" / name for name in ("selections.jsonl", "decisions.jsonl")]
    whole = {path: path.read_bytes() for path in paths}
    first = {path: path.read_bytes()[: path.read_bytes().index(b"\n") + 1] for path in paths}
    again = dataclasses.replace(config, resume=True)
    cut, fingerprints = tmp_path / "run" / file, tiny_pair.engine.fingerprints
    sizes = range(len(first[cut]), len(whole[cut]))
    # no part of a JSON object is JSON: what differs is that nothing is left, a part, and all but the end of the line
    for size in {*sizes[:3], *sizes[::31], *sizes[-3:]}:
        for path in paths:
            path.write_bytes(whole[path])
        cut.write_bytes(whole[cut][:size])
        # whatever is left of the line, resuming begins with the first prompt done and nothing of the second
        with Run.open(again, "select", journal="selections.jsonl", fingerprints=fingerprints) as run:
            done = keep_complete(run, read_problems(data), str(data))
        assert done == {json.loads(first[cut])["index"]}, f"cut at byte {size}"
        assert {path: path.read_bytes() for path in paths} == first, f"cut at byte {size}"
    run_select(again, tiny_pair.engine)
    assert {path: path.read_bytes() for path in paths} == whole


KILLED = """
import os, signal, sys
import genssd.commands
import genssd.distill.runs.journal as journal
from genssd.cli import main

def run_and_kill(victim, torn, words):
    calls = 0
    whole = journal.Journal.append_line

    def append_line(self, line):
        nonlocal calls
        calls += 1
        if calls == victim:
            if torn:
                self._file.append(b'{"messages": [{"role": "us')
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, line)

    journal.Journal.append_line = append_line
    main(words)

for case in sys.argv[1].split():  # imports take longer than the searches
    victim, torn = case.split(",")
    child = os.fork()
    if child == 0:
        run_and_kill(int(victim), torn == "torn", [*sys.argv[2:], "--output-dir", case])
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, case
"""


@pytest.mark.slow
def test_kill_9_and_resume(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = {"threshold": 200.0, "on_unlearnable": "resample", "selection_temperature": 50.0}
    config = config_for(tiny_pair, write_rows(PROMPTS), Path("whole"), **odd)
    run_select(config, tiny_pair.engine)
    flags = ["--teacher", config.teacher, "--student", config.student, "--data", config.data]
    flags += ["--candidates", "2", "--chunk.tokens", "3", "--chunk.until", "None"]
    flags += ["--max-tokens", "8", "--sampling.top-p", "1.0", "--memory-bytes", str(1 << 24)]
    flags += [word for name, value in odd.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    cases = ("3,clean", "4,torn", "5,torn")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, " ".join(cases), "select", *flags], capture_output=True, text=True
    )
    assert killed.returncode == 0, killed.stderr
    for case in cases:
        survived = len(Path(case, "selections.jsonl").read_bytes().splitlines())
        assert survived < len(PROMPTS)
        run_select(dataclasses.replace(config, output_dir=case, resume=True), tiny_pair.engine)
        for file in ("selections.jsonl", "decisions.jsonl"):
            resumed, whole = lines(Path(case, file)), lines(Path("whole", file))
            assert sorted(row["index"] for row in resumed) == [0, 1, 2, 3]
            key = lambda row: row["index"]  # noqa: E731
            assert sorted(resumed, key=key) == sorted(whole, key=key)


def test_a_prompt_that_is_too_long_is_named_by_file_and_line_and_the_others_run(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    data = write_rows([{"prompt": "x" * 600}, {"prompt": "fine"}])
    summary = run_select(config_for(tiny_pair, data, tmp_path / "run"), tiny_pair.engine)
    (failure,) = summary.failures
    assert re.search(r"data\.jsonl, line 1: the prompt has 600 tokens; the teacher .* has 512 positions$", failure)
    assert [row["index"] for row in lines(tmp_path / "run" / "selections.jsonl")] == [1]


def test_an_output_dir_that_is_a_file(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir .*file cannot be written"):
        run_select(config_for(tiny_pair, write_rows(PROMPTS), tmp_path / "file"), tiny_pair.engine)


def test_progress_counts_up(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    progress = Recorder()
    config = config_for(tiny_pair, write_rows(PROMPTS), tmp_path / "run")
    run_select(config, tiny_pair.engine, progress)
    assert progress.counts == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert progress.notes == [f"4 problems read from {config.data}"]
    run_select(dataclasses.replace(config, resume=True), tiny_pair.engine, progress)
    assert progress.notes[1:] == [
        f"4 problems read from {config.data}, 4 of them finished in an earlier part of the run"
    ]


def test_a_lost_journal_stops_a_resume_and_nothing_is_cut(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    config = config_for(tiny_pair, write_rows(PROMPTS), tmp_path / "run")
    run_select(config, tiny_pair.engine)
    files = [tmp_path / "run" / name for name in ("selections.jsonl", "decisions.jsonl")]
    whole = [file.read_bytes() for file in files]
    for lost, held in ((0, 1), (1, 0)):
        files[lost].unlink()
        with pytest.raises(
            InputError, match=rf"{files[lost]} is lost, and {files[held].name} .* remove {files[held]} to begin anew"
        ):
            run_select(dataclasses.replace(config, resume=True), tiny_pair.engine)
        assert files[held].read_bytes() == whole[held]
        assert not files[lost].exists()
        files[held].unlink()  # as the message says
        run_select(config, tiny_pair.engine)
        assert [file.read_bytes() for file in files] == whole


def test_what_only_one_journal_holds_is_done_again_and_their_order_is_mended(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    config = config_for(tiny_pair, write_rows(PROMPTS), tmp_path / "run")
    run_select(config, tiny_pair.engine)
    selections, decisions = (tmp_path / "run" / name for name in ("selections.jsonl", "decisions.jsonl"))
    selected, decided = (file.read_bytes().splitlines(keepends=True) for file in (selections, decisions))
    a, b, c, d = range(4)
    for left, left_decisions in (
        ([a, c, d], [a, b, c, d]),  # the user removed a damaged line of one journal
        ([a, b, c, d], [b, c, d]),  # or of the other
        ([a, b, c, d], [a, b]),
        ([a, b, c, d], [d, c, b, a]),
        ([c, a, b], [a, b, d]),
    ):
        selections.write_bytes(b"".join(selected[i] for i in left))
        decisions.write_bytes(b"".join(decided[i] for i in left_decisions))
        run_select(dataclasses.replace(config, resume=True), tiny_pair.engine)
        kept = [i for i in left if i in left_decisions]
        lines_now = selections.read_bytes().splitlines(keepends=True)
        assert lines_now[: len(kept)] == [selected[i] for i in kept]
        assert sorted(lines_now) == sorted(selected)
        order = [selected.index(line) for line in lines_now]
        assert decisions.read_bytes().splitlines(keepends=True) == [decided[i] for i in order]


def test_two_runs_do_not_share_a_directory(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    config = config_for(tiny_pair, write_rows(PROMPTS), tmp_path / "run")
    with claim_directory(tmp_path / "run", "select"), pytest.raises(InputError, match="another run is at work in"):
        run_select(config, tiny_pair.engine)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "run.json").write_text('{"command": "train"}')
    with pytest.raises(InputError, match="belongs to a run of `genssd train`"):
        run_select(config, tiny_pair.engine)


def test_a_prompt_that_outgrows_the_cache_is_reported_and_tried_again(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path
) -> None:
    """Its first rounds fit, a later one does not even alone; the others go on."""
    data = write_rows([{"prompt": "a" * 40}, {"prompt": "b"}, {"prompt": "c"}])
    config = config_for(
        tiny_pair, data, tmp_path / "run", candidates=4, chunk=Chunk(tokens=16, until=None), max_tokens=64
    )
    tight = Engine.from_pretrained(tiny_pair.teacher, tiny_pair.student, memory_bytes=13 * 16 * 1024)
    summary = run_select(config, tight)
    assert len(summary.failures) == 1
    assert summary.failures[0].startswith(f"{data}, line 1: the prompt's next round does not fit")
    assert [row["index"] for row in lines(tmp_path / "run" / "selections.jsonl")] == [1, 2]
    assert tight.pages_in_use[0] == 0
    again = run_select(dataclasses.replace(config, resume=True), tiny_pair.engine)
    assert (again.prompts, again.failures) == (3, ())


def test_results_do_not_depend_on_the_number_of_threads(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data, journals = write_rows(PROMPTS), []
    for threads in (1, 3):
        output_dir = tmp_path / str(threads)
        run_select(config_for(tiny_pair, data, output_dir, threads=threads, beam=2, candidates=3))
        record = json.loads((output_dir / "run.json").read_text())
        assert record["threads"] == threads
        journals.append((output_dir / "selections.jsonl").read_bytes())
    assert journals[0] == journals[1]


def test_rows_end_at_stop_strings_and_name_them(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    """With one candidate, a run with stop strings writes what a run without them writes, up to the first string."""
    data, engine = write_rows(PROMPTS), tiny_pair.engine
    tokenizer = engine.tokenizer("teacher")
    options: dict[str, Any] = {"candidates": 1, "loop_guard": False, "max_tokens": 24}
    run_select(config_for(tiny_pair, data, tmp_path / "plain", **options), engine)
    plain = {row["index"]: row for row in lines(tmp_path / "plain" / "selections.jsonl")}
    texts = [str(tokenizer.hf.decode(plain[index]["completion_ids"])) for index in range(len(PROMPTS))]
    letters = [
        letter for text in texts for letter in text[2:] if letter.isascii() and letter not in "<|im_end|>startpad"
    ]
    options["stop"] = (letters[0], letters[-1], "never seen")
    run_select(config_for(tiny_pair, data, tmp_path / "whole", **options), engine)
    rows = sorted(lines(tmp_path / "whole" / "selections.jsonl"), key=lambda row: row["index"])
    decisions = {row["index"]: row for row in lines(tmp_path / "whole" / "decisions.jsonl")}
    num_stopped = 0
    for row, text in zip(rows, texts, strict=True):
        places = [(place, stop) for stop in options["stop"] if (place := text.find(stop)) >= 0]
        place, stop = min(places, default=(len(text), None))
        assert str(tokenizer.hf.decode(row["completion_ids"])) == text[:place]
        assert row["stop_reason"] == stop
        assert len(row["teacher_logprobs"]) == len(row["completion_ids"])
        if stop is not None:
            assert (row["status"], row["cut_by"]) == ("finished", None)
            last = decisions[row["index"]]["candidates"][-1]
            assert (last["ended"], last["stop_reason"]) == ("stopped", stop)
            num_stopped += 1
    assert num_stopped >= 2
    part = config_for(tiny_pair, data, tmp_path / "part", limit=2, **options)
    run_select(part, engine)
    run_select(dataclasses.replace(part, limit=None, resume=True), engine)
    for name in ("selections.jsonl", "decisions.jsonl"):
        part_lines, whole_lines = ((tmp_path / run / name).read_bytes().splitlines() for run in ("part", "whole"))
        assert sorted(part_lines) == sorted(whole_lines)
    with pytest.raises(InputError, match="stop"):
        run_select(dataclasses.replace(part, limit=None, resume=True, stop=("x",)), engine)
