"""The commands and programs of README.md and docs/, and a directory in which they run as they are printed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from genssd.distill.small_pair.problems import make_problems

ROOT = Path(__file__).resolve().parents[2]
PAIR = ROOT / "distill/small_pair"
HISTORY = ("log.md", "row_texts.md")
"""Pages that tell what was done, with the commands of that time, and one without commands."""
SHELLS = ("sh", "console")
"""Languages of fences that hold commands: alone, or after `$` with their output below."""
STARTS = ("genssd", "torchrun", "python", "pip", "make", "git", "bash", "vllm", "source", "cd")
"""First words of commands in a block without a language."""
TEACHERS = ("T", "T1", "T2", "Qwen/Qwen3-8B", "Qwen/Qwen3-32B", "HuggingFaceTB/SmolLM2-1.7B-Instruct")
STUDENTS = ("S", "MODEL", "Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct")
"""Names of models on the pages; in the directory of a page each is the shipped teacher or student."""
HUB_NAMES = tuple(name for name in (*TEACHERS, *STUDENTS) if "/" in name)
PROBLEM_FILES = ("problems.jsonl", "test.jsonl", "held_out.jsonl", "openai/gsm8k/main:train", "openai/gsm8k/main:test")
TRACE_FILES = ("traces.jsonl", "rows.jsonl", "problems_with_solutions.jsonl")
"""Names of data files on the pages; the data sets of the hub among them are files here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A program, or a command with what a page says that it prints."""

    page: str
    kind: Literal["program", "command"]
    text: str
    language: str = ""
    output: str = ""

    @property
    def words(self) -> list[str]:
        """Words of a command, without comments."""
        return shlex.split(self.text, comments=True)


def list_pages() -> dict[str, str]:
    """Return the texts of README.md and of the pages in docs/ by name, HISTORY left out; none beside a wheel."""
    paths = [*ROOT.glob("README.md"), *sorted((ROOT / "docs").glob("*.md"))]
    return {path.name: path.read_text() for path in paths if path.name not in HISTORY}


def read_parts(page: str, text: str) -> Iterator[Part]:
    """Yield the programs and commands of a page in their order."""
    for language, block in _iter_blocks(text):
        if language == "python":
            yield Part(page=page, kind="program", text=block)
        elif language in ("", *SHELLS):
            yield from _read_commands(page, language, block)


def _iter_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield language and text of the fences of a page, and of its blocks that are indented by four spaces."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    position = 0
    for match in fence.finditer(text):
        yield from _iter_indented(text[position : match.start()])
        yield match[1], match[2]
        position = match.end()
    yield from _iter_indented(text[position:])


def _iter_indented(text: str) -> Iterator[tuple[str, str]]:
    for match in re.finditer(r"(?:^ {4}\S.*\n(?:^ {4,}.*\n|^\n(?= {4}))*)", text, re.MULTILINE):
        yield "", re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE)


def _read_commands(page: str, language: str, block: str) -> Iterator[Part]:
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    for i, line in enumerate(lines):
        command = line.removeprefix("$ ").strip()
        is_command = line.startswith("$ ") if language == "console" else command.split(" ")[0] in STARTS
        if language == "sh":
            is_command = bool(command) and not command.startswith("#")
        if is_command:
            following = range(i + 1, len(lines))
            end = next((j for j in following if lines[j].startswith("$ ")), len(lines))
            output = "\n".join(lines[i + 1 : end]).strip() if language == "console" else ""
            yield Part(page=page, kind="command", text=command, language=language, output=output)


def list_inline_commands(text: str) -> list[str]:
    """Return the commands of genssd that stand in a page's sentences and tables."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"(?<!`)`(genssd [a-z][^`\n]*)`(?!`)", text)


def fill_directory(directory: Path) -> None:
    """Put under every name that a page uses what it stands for: the shipped pair, and a few rows."""
    (directory / "distill").symlink_to(ROOT / "distill")
    for names, role in ((TEACHERS, "teacher"), (STUDENTS, "student")):
        for name in names:
            _copy_model(PAIR / role, directory / name)
    for seed, file in enumerate(PROBLEM_FILES):
        rows = [
            {
                "question": p.question,
                "answer": f"Add them.\n#### {p.answer}" if "/" in file else p.answer,
                "hint": "add",
            }
            for p in make_problems(4, seed, split="eval" if "test" in file else "train")
        ]
        _write_rows(directory / file, rows)
    for seed, file in enumerate(TRACE_FILES, start=20):
        traces = [
            {"question": p.question, "answer": p.answer, "response": f"I add.\n\\boxed{{{p.answer}}}"}
            for p in make_problems(4, seed)
        ]
        _write_rows(directory / file, traces)
    _write_rows(directory / "texts.jsonl", [{"prompt": "The proof is"}])
    _write_rows(directory / "long.jsonl", [{"question": "7+" * 3000 + "?"}, {"question": "1+2?"}])
    (directory / "bad.jsonl").write_text('{"question": "1+2?"}\n{"text": "x"}\n{"question": \n')


def _copy_model(source: Path, target: Path) -> None:
    """Link the files of a model, but for the chat template, which here reads Qwen3's switch as well."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != "chat_template.jinja":
            (target / path.name).symlink_to(path)
    template = (source / "chat_template.jinja").read_text()
    (target / "chat_template.jinja").write_text("{% set switch = enable_thinking %}" + template)


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
