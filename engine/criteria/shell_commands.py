"""Shell commands in a response: which of them observe the environment, which change it, and the paths that they name.

A turn is what is run before its output is seen: a fenced block of a shell language, or the commands of one answer in
Terminus' JSON ("keystrokes"). Sets of programs and rules of paths are in part ours, see criteria/grounding.py.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

OBSERVING = frozenset(("cat", "ls", "find", "grep", "head", "wc", "diff", "stat"))
"""Programs that look at the environment, as the paper of TOR lists them."""
CHANGING = frozenset(
    (
        *("sed", "tee", "cp", "mv", "rm", "mkdir", "rmdir", "touch", "chmod", "chown", "ln", "patch", "git", "dd"),
        *("tar", "unzip", "gzip", "pip", "pip3", "apt", "apt-get", "yum", "npm", "yarn", "cargo", "wget", "curl"),
        *("make", "cmake", "gcc", "g++", "clang", "go", "javac", "java", "python", "python3", "node", "bash", "sh"),
        *("perl", "ruby", "Rscript", "pytest"),
    )
)
"""Programs that act: they edit files, install or run something."""
TESTING = frozenset(("pytest", "tox", "unittest", "make", "ctest"))
"""Programs whose run verifies what was done before it."""
PREFIXES = frozenset(("sudo", "env", "nohup", "time", "exec"))
PYTHON = frozenset(("python", "python3"))
DIRECTORY_DEFAULT = frozenset(("ls", "find"))
"""Programs that look at the working directory where they are given no path."""
PATTERN_FIRST = frozenset(("grep", "sed"))
"""Programs whose first operand is a pattern or a script, and no path."""

FENCE = re.compile(r"^[ \t]*```[ \t]*(?P<language>\w*)[^\n]*\n(?P<body>.*?)(?=^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
SHELLS = frozenset(("bash", "sh", "shell", "zsh", "console", "terminal"))
KEYSTROKES = re.compile(r'"keystrokes"\s*:\s*(?P<text>"(?:[^"\\]|\\.)*")')
ANSWER_START = re.compile(r'"commands"\s*:\s*\[')
HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")
ASSIGNMENT = re.compile(r"\w+=")
EXPANSION = re.compile(r"[$`()*?{}]")
START, HOME = "/~start", "/~home"
"""Stand for the working directory that a response begins in and for the home directory, which are not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command of a response."""

    turn: int
    """Index of the turn that it belongs to."""
    start: int
    """Index of a character of its block in the text: of the line that it begins on."""
    kind: Literal["observation", "action", "other"]
    paths: tuple[str, ...]
    """Absolute paths that it names; relative ones stand below the first working directory, which stands for itself."""
    is_test: bool


def read_commands(text: str) -> list[Command]:
    """Return the shell commands of a response in order, working directories followed."""
    directory = START
    commands = []
    for turn, start, line in _iter_lines(text):
        for words in _split_line(line):
            command, directory = _classify(words, directory, turn, start)
            if command is not None:
                commands.append(command)
    return commands


def is_aligned(observed: Command, acting: Command) -> bool:
    """Return whether a path that was observed is one that is acted on, or a directory that holds it."""
    return any(
        path == seen or path.startswith(seen.rstrip("/") + "/") for path in acting.paths for seen in observed.paths
    )


def _iter_lines(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield every command line with its turn and a position in the text."""
    blocks = [(m.start("body"), m["language"].lower(), m["body"]) for m in FENCE.finditer(text)]
    shell_blocks = [(start, body) for start, language, body in blocks if language in SHELLS]
    turn = 0
    for start, body in shell_blocks:
        for offset, line in _join_lines(body):
            yield turn, start + offset, line
        turn += 1
    starts = [m.start() for m in ANSWER_START.finditer(text)]
    for match in KEYSTROKES.finditer(text):
        try:
            keystrokes = json.loads(match["text"], strict=False)
        except ValueError:
            continue
        answer = sum(start < match.start() for start in starts)
        for _, line in _join_lines(keystrokes):
            yield turn + answer, match.start(), line


def _join_lines(block: str) -> Iterator[tuple[int, str]]:
    """Yield the command lines of a block with their positions: quotes, trailing backslashes and heredocs go on."""
    at, parts, end = 0, "", None
    start = 0
    has_prompts = bool(re.search(r"^\s*\$ ", block, re.MULTILINE))
    for line in block.split("\n"):
        if end is not None:
            if line.strip() == end:
                end = None
                yield start, parts
                parts = ""
        elif parts or not has_prompts or line.lstrip().startswith("$ "):  # lines without a prompt are output
            if not parts:
                start, line_text = at, line.strip().removeprefix("$ ")
            else:
                line_text = line
            parts = f"{parts}\n{line_text}" if parts else line_text
            heredoc = HEREDOC.search(line_text)
            if heredoc is not None:
                parts, end = HEREDOC.sub("", parts), heredoc[2]
            elif parts.endswith("\\"):
                parts = parts[:-1] + " "
            elif _has_open_quote(parts):
                pass
            else:
                yield start, parts
                parts = ""
        at += len(line) + 1
    if parts:
        yield start, parts


def _has_open_quote(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


def _split_line(line: str) -> Iterator[list[str]]:
    """Yield the words of every command of a line; what follows a pipe belongs to the command before it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError:  # an open quote at the end of the text
        tokens = line.split()
    words: list[str] = []
    for token in tokens:
        if token in ("&&", "||", ";"):
            yield words
            words = []
        else:
            words.append(token)
    yield words


def _classify(words: list[str], directory: str, turn: int, start: int) -> tuple[Command | None, str]:
    """Return a command of these words, None for one without a program, and the working directory after it."""
    while words and (words[0] in PREFIXES or ASSIGNMENT.match(words[0]) or words[0] == "timeout"):
        words = words[2:] if words[0] == "timeout" else words[1:]
    if not words:
        return None, directory
    program = posixpath.basename(words[0])
    if program == "cd":
        return None, _resolve(words[1], directory) if len(words) > 1 else HOME
    operands, written = _read_operands(words[1:])
    if program in PATTERN_FIRST or (program in PYTHON and "-m" in words):
        operands = operands[1:]
    kind: Literal["observation", "action", "other"] = "other"
    if written or program in CHANGING:
        kind = "action"
    elif program in OBSERVING:
        kind = "observation"
        if program in DIRECTORY_DEFAULT and not operands:
            operands = ["."]
    command = Command(
        turn=turn,
        start=start,
        kind=kind,
        paths=tuple(dict.fromkeys(_resolve(word, directory) for word in (*operands, *written))),
        is_test=program in TESTING or (program in PYTHON and bool(TESTING & set(words))),
    )
    return command, directory


def _read_operands(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the operands of a program up to a pipe, and the files that its output is written to.

    Options, expansions of the shell and the null device are left out: what they stand for is not known.
    """
    operands: list[str] = []
    written: list[str] = []
    is_piped = False
    for before, word in zip(["", *words], words, strict=False):
        is_piped = is_piped or word == "|"
        is_path = not (word.startswith(("-", ">", "<", "|", "&")) or EXPANSION.search(word) or word == "/dev/null")
        if before in (">", ">>", "&>"):
            written += [word] if is_path else []
        elif is_path and not is_piped and before != ">&" and not word.isdigit():
            operands.append(word)
    return operands, written


def _resolve(path: str, directory: str) -> str:
    """Return an absolute path. Home and the first working directory are taken for directories of their own."""
    if path == "~" or path.startswith("~/"):
        path = HOME + path[1:]
    return posixpath.normpath(posixpath.join(directory, path))
