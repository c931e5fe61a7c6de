"""Every command and program of README.md and docs/ is executed as it is printed.

In the directory of a page the names of models (Qwen/Qwen3-8B, T, ...) are the small pair that ships with genssd, and
those of data files are a few of its problems (support/doc_pages.py). What is done with a command:

* run: the pages in RUN, commands and programs in their order; the programs of all other pages as well;
* examined: a command that would take long, or a server, by the real argument parser and, where it has one, by its
  doctor;
* read: the commands of all other pages, by the real argument parser with its check of options without an effect, and
  on the pages in EXAMINED_PAGES by the doctor, over a finished selection;
* looked up: commands of other programs: the target of make, the module, the extra, the script.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import shutil
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.doc_pages import (
    HUB_NAMES,
    ROOT,
    Part,
    fill_directory,
    list_inline_commands,
    list_pages,
    read_parts,
)
from support.memory_table import make_selection_table, make_small_table, make_training_table

from genssd.cli import SUMMARIES, main
from genssd.commands import COMMANDS
from genssd.configs import CONFIGS
from genssd.distill.runs.effects import check_effects
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.flag_list import list_flags
from genssd.flags import read_incomplete

pytestmark = pytest.mark.source

PAGES = list_pages()
RUN = (
    "README.md",
    "quickstart.md",
    "gsm8k.md",
    "cpu.md",
    "commands.md",
    "baselines.md",
    "own_criterion.md",
    "own_search.md",
    "determinism.md",
    "failures.md",
    "formats.md",
)
"""Pages whose commands and programs are run."""
LONG = ("demo", "tune", "diagnose", "distill")
"""Commands that take minutes, or a GPU."""
EXAMINED = ("select", "train", "distill", "generate", "evaluate")
"""Commands that the doctor examines."""
EXAMINED_PAGES = ("training.md", "search.md", "criteria.md", "diagnosing.md")
"""Pages of many commands, which would take minutes together."""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fill_directory(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # engines of programs live as long as their page; their caches, nine tenths of the memory, are hardly filled
    monkeypatch.setattr("genssd.engine.setup.memory.count_promised_bytes", lambda: 0)
    return tmp_path


def call(words: Sequence[str]) -> int:
    """Run a command in this process and return its exit code."""
    gc.collect()  # the caches of the command before count as taken until their engine is gone
    try:
        main(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def own_words(words: list[str]) -> list[str] | None:
    """Return the words after `genssd` of a command line, also of one by torchrun; None for another program's."""
    if words[0] == "genssd":
        return words[1:]
    return words[words.index("genssd") + 1 :] if words[0] == "torchrun" else None


def read(words: Sequence[str]) -> Any:
    """Return the config that a command's flags stand for; `...` on a page stands for the required ones."""
    command, *flags = words
    if command == "doctor":
        examined = next((i for i, word in enumerate(flags) if word in SUMMARIES), None)
        if examined is not None:
            read(flags[examined:])
        flags = flags[:examined]
    if command.startswith("--") or {"--help", "--print-config"} & {*flags}:
        return None
    flags = [flag for flag in flags if flag not in ("...", "[...]")]
    if command == "doctor":  # it has an option `config` of its own
        names = {name for flag in list_flags(CONFIGS[command]) for name in flag.names}
        assert {flag for flag in flags if flag.startswith("--")} <= names
        return None
    config, missing = read_incomplete(command, flags, CONFIGS[command])
    if not missing:
        check_effects(config)
    return config


def look_up(words: list[str]) -> None:
    """Find what a command of another program names."""
    text = " ".join(words)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {*words[1:]} <= {*targets}, text
    elif words[0] == "pip":
        extras = re.findall(r"genssd\[(\w+)\]", text)
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras), text
    elif words[:2] == ["python", "-m"] and words[2].startswith("bench"):
        assert importlib.util.find_spec(words[2]) is not None, text
    elif words[0] == "bash":
        assert (ROOT / words[1]).is_file(), text
    else:
        assert words[0] in ("git", "vllm", "python", "source"), f"nothing is known about `{text}`"


def parts_of(page: str) -> list[Part]:
    return list(read_parts(page, PAGES[page]))


@pytest.mark.parametrize("page", RUN)
def test_the_commands_and_programs_run(
    page: str, directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = types.ModuleType(page)
    monkeypatch.setitem(sys.modules, page, program)  # dataclasses look their module up
    for part in parts_of(page):
        if part.kind == "program":
            exec(compile(part.text, page, "exec"), program.__dict__)
            continue
        words = own_words(part.words)
        if words is None:
            look_up(part.words)
        elif (words[0] in LONG and not part.output) or "://" in part.text:
            read(words)
            if words[0] in EXAMINED and "://" not in part.text:
                assert call(["doctor", *words]) < 2, capsys.readouterr()
        else:
            capsys.readouterr()
            code = call(words)
            printed = capsys.readouterr()
            said = f"{part.text}\n{printed.out}{printed.err}"
            if part.output:  # an error that the page shows
                assert code == 2, said
                assert " ".join(part.output.split()) in " ".join(f"{printed.out} {printed.err}".split()), said
            else:
                assert code == 0 or (code == 1 and words[0] == "doctor"), said
    sys.modules.pop("challenge", None)


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished selection with the teacher's most likely tokens and hidden states."""
    base = tmp_path_factory.mktemp("selection")
    fill_directory(base)
    names = {"teacher": str(base / "T"), "student": str(base / "S"), "data": str(base / "problems.jsonl")}
    options: dict[str, Any] = {"teacher_topk": 16, "teacher_states": "bfloat16", "max_tokens": 160}
    run_select(SelectConfig(**names, **options, output_dir=str(base / "run"), memory_bytes=1 << 28))
    return base / "run"


@pytest.mark.parametrize("page", sorted({*PAGES} - {*RUN}))
def test_the_commands_are_read(
    page: str, directory: Path, selection: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = types.ModuleType(page)
    monkeypatch.setitem(sys.modules, page, program)
    for part in parts_of(page):
        if part.kind == "program":
            exec(compile(part.text, page, "exec"), program.__dict__)
        elif (words := own_words(part.words)) is None:
            look_up(part.words)
        else:
            read(words)
            if page in EXAMINED_PAGES and words[0] in EXAMINED:
                shutil.copytree(selection, directory / "runs/select", dirs_exist_ok=True)
                assert call(["doctor", *words, "--output-dir", "runs/examined"]) < 2, (part.text, capsys.readouterr())


def test_the_commands_in_sentences_have_their_flags() -> None:
    for page, text in PAGES.items():
        for line in list_inline_commands(text):
            command, *words = line.split()[1:]
            examined = words[:1] if command == "doctor" and words[:1] and words[0] in CONFIGS else []
            if command not in CONFIGS:
                assert command in ("command",), f"{page}: {line}"
                continue
            own = [name for c in (command, *examined) for flag in list_flags(CONFIGS[c]) for name in flag.names]
            known = {*own, "--help", "--config", "--print-config"}
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert flags <= known, f"{page}: {line}"


def test_how_many_stand_for_other_models(record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Print how many programs and commands there are, and how many of them name models of the hub."""
    parts = [part for page in PAGES for part in parts_of(page)]
    named = [part for part in parts if any(name in part.text for name in HUB_NAMES)]
    run = [part for part in named if part.page in RUN]
    kinds = {kind: [part for part in parts if part.kind == kind] for kind in ("program", "command")}
    with capsys.disabled():
        print(
            f"\nREADME.md and docs/: {len(kinds['program'])} programs, {len(kinds['command'])} commands; "
            f"{len(named)} of both name models of the hub, {len(run)} of these run on the small pair in their place"
        )
    assert {part.kind for part in run} == {"program", "command"}


def test_every_command_is_described() -> None:
    assert list(CONFIGS) == list(COMMANDS)
    assert set(SUMMARIES) == set(COMMANDS)
    text = "".join(PAGES.values()) + (ROOT / "Makefile").read_text()
    assert all(f"genssd {name}" in text for name in COMMANDS)


def test_the_programs_of_the_searches_are_those_of_the_examples() -> None:
    examples = [(ROOT / f"examples/{name}.py").read_text() for name in ("lookahead", "mcts")]
    programs = [part.text for part in parts_of("own_search.md") if part.kind == "program"]
    for example, name in zip(examples, ("def look_ahead", "def descend"), strict=True):
        (program,) = [text for text in programs if name in text]
        blocks = [block.strip() for block in re.split(r"\n\n\n", program)[1:]]
        assert len(blocks) >= 3
        assert all(block in example for block in blocks)


def read_measured() -> dict[str, str]:
    """The numbers of the files in bench/results, as the table of README.md prints them."""
    results = ROOT / "bench/results"
    numbers: dict[str, str] = {}
    for file in ("cpu_peers", "cpu_peers_search"):
        for row in json.loads((results / f"{file}.json").read_text())["rows"]:
            if row["seconds"] is not None:
                digits = 2 if row["seconds"] < 10 else 1
                numbers[f"{row['workload']} {row['engine']}"] = f"{row['seconds']:.{digits}f} s"
    for row in json.loads((results / "train.json").read_text())["rows"]:
        numbers[f"{row['kind']} {row['program']}"] = f"{row['seconds_per_step']:.2f} s, {row['peak_mib']} MiB"
    for line in (results / "h200-probe.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["microseconds"]:
            time = row["microseconds"] / 1000
            numbers[f"{row['operation']} {row['shape']} {row['implementation']}"] = (
                f"{time:.{2 if time < 10 else 1}f} ms"
            )
    for row in json.loads((results / "select_expand.json").read_text())["rows"]:
        if (row["size"], row["value"]) == ("response", 512):
            numbers[f"512 tokens {row['program']}"] = f"{row['seconds']:.1f} s"
    pool = json.loads((results / "pool_5000.json").read_text())
    for program in ("genssd", "transformers"):
        numbers[f"pool {program}"] = f"{pool[program]['seconds']:.0f} s, {pool[program]['peak_mib']} MiB"
    return numbers


MEASURED = (
    ("search, 4 prompts", ("select_expand genssd", "select_expand transformers", "select_expand openvino")),
    ("search, one response", ("512 tokens genssd", "512 tokens caches kept", "512 tokens obvious")),
    ("score 16 candidates", ("score genssd", "score transformers", "score openvino", "score vllm")),
    ("decode 16 branches", ("decode genssd", "decode transformers", "decode openvino", "decode vllm")),
    ("a step of fine-tuning", ("sft genssd", "sft trl")),
    ("a step of distillation", ("jsd genssd", "jsd trl")),
    ("score 8192 tokens", ("score 8192 x 4096 genssd", "score 8192 x 4096 eager")),
    ("prefill attention", ("prefill 8192 genssd", "prefill 8192 SDPA")),
    ("score 5,000", ("pool genssd", "pool transformers")),
)
"""Rows of the table of README.md, by their beginning, and what of the files stands in them, in order."""


def test_the_measured_table_is_that_of_the_files() -> None:
    numbers = read_measured()
    section = PAGES["README.md"].split("## What it does beside")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(MEASURED)
    for row, (beginning, names) in zip(rows, MEASURED, strict=True):
        assert row.startswith(f"| {beginning}"), row
        printed = re.findall(
            r"[\d.]+ m?s(?:, \d+ MiB)?", row.replace("*", "").split("|")[2] + row.replace("*", "").split("|")[3]
        )
        assert printed == [numbers[name] for name in names], row


def read_tables(page: str) -> Iterator[tuple[str, list[str]]]:
    for match in re.finditer(r"<!-- (memory of [a-z ]*) -->\n(.*?)\n<!-- end -->", PAGES[page], re.DOTALL):
        yield match[1], match[2].splitlines()


def test_the_tables_of_memory_are_those_of_the_plan(tmp_path: Path) -> None:
    makers = {
        "memory of a selection": make_selection_table,
        "memory of a training": make_training_table,
        "memory of small models": make_small_table,
    }
    tables = {name: (page, lines) for page in ("gsm8k.md", "cpu.md") for name, lines in read_tables(page)}
    assert tables.keys() == makers.keys()
    for name, (page, lines) in tables.items():
        wanted = makers[name](tmp_path)
        if os.environ.get("GENSSD_WRITE_DOCS"):
            path = ROOT / "docs" / page
            path.write_text(path.read_text().replace("\n".join(lines), "\n".join(wanted)))
        else:
            assert lines == wanted, f"{page}: GENSSD_WRITE_DOCS=1 pytest tests/test_readme.py writes it again"
