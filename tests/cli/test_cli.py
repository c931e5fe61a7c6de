"""The command line: configs, exit codes, messages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_pair import TinyPair
from support.toys import edit_json, save_checkpoint, save_model, save_tokenizer

from genssd import cli
from genssd.cli import main
from genssd.distill.score.prefix_config import PrefixConfig
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.train.config import TrainConfig
from genssd.engine.common.errors import InputError
from genssd.engine.models.launches import LaunchRecord
from genssd.flags import flags_of_file, merge_list_flags

Write = Callable[..., Path]


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run; expect exit code 2 and one message; return it."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, words)))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def select_flags(pair: TinyPair, data: Path, output_dir: Path) -> list[str]:
    flags = ["select", "--teacher", pair.teacher, "--student", pair.student, "--data", data, "--output-dir", output_dir]
    more = ["--candidates", "2", "--chunk.tokens", "4", "--max-tokens", "8", "--memory-bytes", str(1 << 24)]
    return [*map(str, flags), *more]


def test_select_train_evaluate_in_a_row(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows([{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(5)])
    main(select_flags(tiny_pair, data, tmp_path / "select"))
    assert "5 prompts: " in capsys.readouterr().out
    selections = tmp_path / "select" / "selections.jsonl"
    main(
        f"train --model-name-or-path {tiny_pair.student} --data {selections} --max-steps 2 "
        f"--output-dir {tmp_path / 'train'} --statuses finished length".split()
    )
    assert "2 steps on 5 examples" in capsys.readouterr().out
    main(
        f"evaluate --model {tmp_path / 'train'} --data {data} --output-dir {tmp_path / 'evaluate'} --max-tokens 5 "
        f"--samples 2 --memory-bytes {1 << 22}".split()
    )
    out = capsys.readouterr().out
    assert "greedy accuracy 0.0 %" in out
    assert "avg@2" in out


def test_score_and_reselect_after_a_selection(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(select_flags(tiny_pair, write_rows([{"question": f"{i}+{i}?"} for i in range(3)]), tmp_path / "select"))
    main(f"reselect --run {tmp_path / 'select'} --criterion rsr --output-dir {tmp_path / 'again'}".split())
    out = capsys.readouterr().out
    assert "of 3 prompts judged again by rsr" in out
    selections = tmp_path / "select" / "selections.jsonl"
    score = ["score", "--student", str(tiny_pair.student), "--memory-bytes", str(1 << 22), "--data"]
    more = ["--criteria", "ppl", "rsr(r_max=50)", "0.5*ppl + 0.5*length", "--pick.no-finished"]
    main([*score, str(selections), *more, "--output-dir", str(tmp_path / "score")])
    assert "3 traces of 3 prompts scored, 3 responses picked" in capsys.readouterr().out
    assert "<h1>" in (tmp_path / "score" / "report.html").read_text()
    spoilt = write_rows([{"prompt": "a", "completion": "b"}, {"prompt": "c"}], "spoilt.jsonl")
    message = fails(capsys, *score, str(spoilt), "--output-dir", str(tmp_path / "spoilt"))
    assert "1 row could not be scored; all others were" in message
    assert f"{spoilt}, line 2: " in message
    assert len((tmp_path / "spoilt" / "scores.jsonl").read_text().splitlines()) == 1


def test_diagnose(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows([{"question": f"{i}+{i}?", "answer": str(2 * i), "hint": "add"} for i in range(2)])
    flags = ["diagnose", "--student", tiny_pair.student, "--data", data, "--output-dir", tmp_path / "run"]
    more = ["--max-tokens", "4", "--rollouts", "1", "--completions", "2", "--memory-bytes", 1 << 22, "--budget", "40"]
    teachers = ["--teacher", tiny_pair.teacher, f"--teacher={tiny_pair.student}"]
    main([*map(str, [*flags, *more, *teachers, "--contexts", "hint"])])
    out = capsys.readouterr().out
    assert "* The student gets 0% of its rollouts right." in out
    assert "with a fresh generation per forced token" in out
    assert "<h2>Verdict</h2>" in (tmp_path / "run" / "diagnosis.html").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["teachers"] == ["itself + hint", "teacher", "student"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "questions.jsonl").read_text().splitlines()]
    assert all(0 < row["spent"]["completions"] <= 40 for row in rows)
    assert "pass --resume" in fails(capsys, *flags, *more, *teachers, "--contexts", "hint")
    assert "begun with teacher=" in fails(capsys, *flags, *more, "--contexts", "hint", "--resume")
    config = tmp_path / "d.yaml"
    config.write_text("completion: 4\n")
    assert "unknown key 'completion'; did you mean 'completions'?" in fails(capsys, *flags, "--config", config)
    assert "diagnose needs a teacher or a context" in fails(capsys, *flags)
    assert "completions must be even" in fails(capsys, *flags, *teachers, "--completions", "3")
    assert "--losses" in fails(capsys, *flags, *teachers, "--losses", "kl")


def test_flags_of_lists_add_up() -> None:
    flags = ["--limit", "3", "--data", "a", "--resume", "--data", "b", "c", "--data=d", "--no-resume"]
    assert merge_list_flags(flags, PrefixConfig) == [
        "--limit",
        "3",
        "--resume",
        "--no-resume",
        "--data",
        "a",
        "b",
        "c",
        "d",
    ]
    assert merge_list_flags([], PrefixConfig) == []
    assert merge_list_flags(["--teacher", "t", "--teacher", "u"], GenerateConfig) == [
        "--teacher",
        "t",
        "--teacher",
        "u",
    ]


def test_a_config_file_and_flags_over_it(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path) -> None:
    data = write_rows([{"prompt": "a"}])
    config = tmp_path / "c.yaml"
    config.write_text(
        f"teacher: {tiny_pair.teacher}\nstudent: {tiny_pair.student}\ndata: {data}\noutput_dir: {tmp_path / 'run'}\n"
        "candidates: 3\nthreshold: 1.5e10\nchunk: {tokens: 2, until: null}\nresume: false\nmax_tokens: 4\n"
        f"memory_bytes: {1 << 22}\nsampling:\n  temperature: 0.5\n"
    )
    main(["select", "--config", str(config), "--candidates", "2", "--sampling.top-p", "0.5"])
    written = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert (written["candidates"], written["threshold"], written["resume"]) == (2, 1.5e10, False)
    assert written["chunk"] == {"tokens": 2, "until": None, "limit": None, "shortest": 8}
    assert (written["sampling"]["temperature"], written["sampling"]["top_p"]) == (0.5, 0.5)


def test_a_file_stands_for_flags(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data: [a.jsonl, b.jsonl]\nbf16: true\ngradient_checkpointing: false\n")
    assert flags_of_file(path, TrainConfig, "train") == [
        *("--data", "a.jsonl", "b.jsonl"),
        *("--bf16", "True"),
        "--no-gradient_checkpointing",
    ]
    path.write_text("")
    assert flags_of_file(path, TrainConfig, "train") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("candidats: 3\n", r"c\.yaml: unknown key 'candidats'; did you mean 'candidates'\?"),
        ("chunk: {token: 3}\n", r"unknown key 'chunk\.token'; did you mean 'tokens'\?"),
        ("zzz: 3\n", r"unknown key 'zzz'; known: .*teacher, student"),
        ("chunk: 3\n", r"chunk must hold keys and values, not 3"),
        ("seed: {a: 1}\n", r"seed must be a single value"),
        ("- a\n", r"must hold keys and values, not list"),
        ("a: [\n", r"is not valid YAML"),
    ],
)
def test_a_bad_config_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        flags_of_file(path, SelectConfig, "select")


def test_words_that_mean_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "unknown command 'selct'; did you mean 'select'?" in fails(capsys, "selct")
    assert "--config needs a file" in fails(capsys, "select", "--config")
    assert "nothing.yaml cannot be read" in fails(capsys, "select", f"--config={tmp_path}/nothing.yaml")
    assert "--candidats" in fails(
        capsys, "select", "--teacher", ".", "--student", ".", "--data", "-", "--candidats", "3"
    )
    missing = (
        "genssd: Missing from genssd select: --teacher STR ... --student STR; `genssd select --help` lists the flags\n"
    )
    assert fails(capsys, "select", "--data", "-") == missing
    choice = fails(capsys, "train", "--data", "-", "--model-name-or-path", ".", "--kd-loss", "x")
    assert choice.startswith("genssd: invalid choice 'x' for argument '--kd-loss'. Expected one of ('forward_kl', ")
    assert choice.count("\n") == 1


def test_options_out_of_range(
    tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = select_flags(tiny_pair, write_rows([{"prompt": "a"}]), tmp_path / "run")
    assert "candidates must be at least 1, not 0" in fails(capsys, *flags, "--candidates", "0")
    assert "beam must be at least 1, not 0" in fails(capsys, *flags, "--beam", "0")
    assert "unknown criterion 'pp'; registered: aslec_casl, aslec_drop" in fails(capsys, *flags, "--criterion", "pp")
    assert "top_p must be in (0, 1], not 0.0" in fails(capsys, *flags, "--sampling.top-p", "0")
    assert "chunk tokens must be at least 1" in fails(capsys, *flags, "--chunk.tokens", "0")


def test_bad_models(tiny_pair: TinyPair, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows([{"question": "q"}])
    flags = select_flags(tiny_pair, rows, tmp_path / "run")

    def with_student(directory: Path) -> str:
        return fails(capsys, *flags, "--student", directory)

    assert "/nowhere does not exist" in with_student(Path("/nowhere"))

    pickled = tmp_path / "pickled"
    save_checkpoint(pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickled has no safetensors weights (it has pytorch_model.bin: pickles are never read" in with_student(
        pickled
    )

    unknown = tmp_path / "unknown"
    save_checkpoint(unknown)
    edit_json(unknown / "config.json", model_type="marmot")
    assert "transformers has no model_type 'marmot'" in with_student(unknown)

    narrow = tmp_path / "narrow"
    narrow.mkdir()
    save_tokenizer(narrow)
    save_model(narrow, vocab_size=100)
    assert "the tokenizer's largest id is 258, but the embedding has 100 rows" in with_student(narrow)

    plain = tmp_path / "plain"
    plain.mkdir()
    save_tokenizer(plain, template=False)
    save_model(plain)
    message = fails(capsys, *flags, "--student", plain, "--teacher", plain)
    assert "data.jsonl, line 1: " in message
    assert "plain has no chat template, but the prompt is a list of messages" in message


def test_bad_data(tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d.jsonl"
    flags = select_flags(tiny_pair, data, tmp_path / "run")
    assert "d.jsonl cannot be read: No such file" in fails(capsys, *flags)
    data.write_text('{"prompt": ""}\n')
    assert "1 row, none of which can be used:\n  " in (message := fails(capsys, *flags))
    assert "d.jsonl, line 1: prompt is empty" in message
    data.write_text(json.dumps({"prompt": "x" * 513}) + "\n")
    assert "d.jsonl, line 1: the prompt has 513 tokens; the teacher" in fails(capsys, *flags)
    data.write_text('{"prompt": "a"}\n')
    assert "the teacher's cache has 1 page (memory_bytes=16384)" in fails(capsys, *flags, "--memory-bytes", "20000")
    (tmp_path / "file").write_text("")
    assert "file cannot be written: " in fails(capsys, *flags, "--output-dir", tmp_path / "file")


BAD_ROWS = [
    '{"prompt": "a", "answer": "1"}',
    '{"prompt"',
    json.dumps({"prompt": "x" * 600, "answer": "1"}),
    '{"nothing": 1}',
    '{"prompt": "b", "answer": "2"}',
]


@pytest.mark.parametrize("command", ["select", "generate", "diagnose"])
def test_bad_problems_are_named_and_the_others_done(
    tiny_pair: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """By the rule of `score`: bad_rows.txt, the number in summary.json, exit code 2 after the rest was done."""
    data, run = tmp_path / "d.jsonl", tmp_path / "run"
    data.write_text("\n".join(BAD_ROWS) + "\n")
    flags = [command, "--teacher", tiny_pair.teacher, "--student", tiny_pair.student, "--data", data]
    flags += ["--output-dir", run, "--max-tokens", 4, "--memory-bytes", 1 << 22]
    flags += ["--rollouts", 1, "--completions", 2] if command == "diagnose" else []
    message = fails(capsys, *flags)
    assert "genssd: 3 rows could not be used; all others were" in message
    bad_rows = (run / "bad_rows.txt").read_text().splitlines()
    starts = ["line 2: not valid JSON", "line 3: the prompt", "line 4: no prompt"]
    for found, start in zip(bad_rows, starts, strict=True):
        assert found.startswith(f"{data}, {start}")
        assert found in message
    summary = json.loads((run / "summary.json").read_text())
    assert summary["bad_rows"] == 3
    journal = run / {"select": "selections.jsonl", "generate": "responses.jsonl"}.get(command, "questions.jsonl")
    before = journal.read_bytes()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [(row["index"], row["source"]["line"]) for row in rows] == [(0, 1), (4, 5)]
    # what is mended is done, and nothing else
    data.write_text("\n".join([*BAD_ROWS[:3], '{"prompt": "c", "answer": "3"}', BAD_ROWS[4]]) + "\n")
    assert "genssd: 2 rows could not be used" in fails(capsys, *flags, "--resume")
    assert journal.read_bytes().startswith(before)
    assert json.loads(journal.read_text().splitlines()[-1])["index"] == 3


@pytest.mark.slow
def test_python_m_genssd_exits_with_2_and_says_why(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "genssd",
        "evaluate",
        "--model",
        str(tmp_path),
        "--data",
        str(tmp_path / "x.jsonl"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f"genssd: {tmp_path}/x.jsonl cannot be read: No such file or directory"
    done = subprocess.run([sys.executable, "-m", "genssd", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("genssd 0.")
    done = subprocess.run([sys.executable, "-m", "genssd"], capture_output=True, text=True)
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            MemoryError(),
            r"genssd: out of memory; [\d,]+ bytes of memory are left for this process: raise the limit .*\n",
        ),
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.\nat"
            ),
            r"genssd: out of memory: .* tried to allocate 99 bytes\.; [\d,]+ bytes of memory are left .*\n",
        ),
        (ImportError("libtorch.so: failed to map segment from shared object"), r"genssd: out of memory: libtorch.*\n"),
    ],
)
def test_refused_memory_is_one_line(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = [RuntimeError("a mistake of ours"), error]

    def run(command: str, flags: list[str]) -> None:
        raise raised.pop()

    monkeypatch.setattr(cli, "_run", run)
    assert re.fullmatch(message, fails(capsys, "select"))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["select"])


def test_kernel_configurations_are_printed_in_one_line(
    tiny_pair: TinyPair,
    write_rows: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU; and the option reaches the engine."""
    seen: list[bool] = []

    def describe(decoders: list[Any]) -> LaunchRecord:
        seen.extend(decoder.deterministic for decoder in decoders)
        return LaunchRecord(source="shipped for sm_90", deterministic=decoders[0].deterministic, digest="aa")

    monkeypatch.setattr("genssd.engine.setup.loading.describe_launches", describe)
    data = write_rows([{"question": "2 + 3?"}])
    main([*select_flags(tiny_pair, data, tmp_path / "out"), "--no-deterministic"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "kernel configurations" in line]
    assert len(lines) == 1
    assert "genssd: kernel configurations: shipped for sm_90, the fastest for every number of rows" in lines[0]
    assert seen == [False, False]
