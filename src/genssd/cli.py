"""The command line: `genssd COMMAND [--config FILE.yaml] [--flag value ...]`.

A command is a config dataclass and the function that runs it. A YAML file's keys become flags in front of the typed
ones, so both are checked alike and what is typed wins. Bad input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import tyro
import yaml
from rich.console import Console

import genssd
from genssd.engine.errors import GenssdError, InputError

COMMANDS = {
    "demo": "the whole job on the small pair that ships with genssd: select, train, evaluate, compare",
    "select": "let the student choose what the teacher writes: problems in, selected trajectories out",
    "score": "criteria over finished traces: columns, the best response per prompt, a ranking of teachers",
    "reselect": "another criterion over the decisions of a finished search; preference pairs, stepwise rows",
    "generate": "responses without selection: standard distillation, pools for score; or token by token (RSD)",
    "prefix": "the shortest beginning of a trace from which the student goes on by itself (P-ALIGN)",
    "leaf": "training rows without the words that distract the student (LeaF)",
    "train": "fine-tune the student on selected trajectories",
    "distill": "rounds of select and train: the trained student chooses in the next round",
    "evaluate": "measure a model's accuracy on problems with known answers",
    "diagnose": "where which teacher, loss or context would help the student, before anything is trained",
}

USAGE = "\n".join(
    [
        "usage: genssd COMMAND [--config FILE.yaml] [--flag value ...]",
        "",
        *(f"  {name:<10}{what}" for name, what in COMMANDS.items()),
        "",
        "`genssd COMMAND --help` lists the flags of a command.",
    ]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, with 2 on bad input, with 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        print(f"genssd {genssd.__version__}")
        return
    try:
        _run(words[0], words[1:])
    except GenssdError as error:
        print(f"genssd: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("genssd: interrupted; finished prompts and checkpoints are on disk", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output has gone; what is left in the buffer goes nowhere, without a second complaint
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run(command: str, words: list[str]) -> None:
    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}{_closest(command, COMMANDS)}\n{USAGE}")
    _quiet_libraries()
    commands = import_module("genssd.commands")
    config_class, run = commands.COMMANDS[command]
    file, flags = _take_config(words)
    from_file = [] if file is None else flags_of_file(file, config_class)
    config = tyro.cli(
        config_class,
        prog=f"genssd {command}",
        args=[*from_file, *joined(flags, config_class)],
        description=config_class.__doc__,
    )
    run(config, Console(stderr=True))


def _quiet_libraries() -> None:
    """Before transformers and datasets load: our progress is the only one shown."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.captureWarnings(True)
    import_module("transformers").utils.logging.disable_progress_bar()


def _take_config(words: list[str]) -> tuple[Path | None, list[str]]:
    """Split `--config FILE` off the flags."""
    for i, word in enumerate(words):
        if word == "--config":
            if i + 1 == len(words):
                raise InputError("--config needs a file")
            return Path(words[i + 1]), words[:i] + words[i + 2 :]
        if word.startswith("--config="):
            return Path(word.removeprefix("--config=")), words[:i] + words[i + 1 :]
    return None, words


def joined(flags: Sequence[str], config_class: type) -> list[str]:
    """The same flags with those of a list, given several times, as one: `--data a --data b` is `--data a b`."""
    hints = typing.get_type_hints(config_class)
    lists = {name for name, hint in hints.items() if typing.get_origin(hint) is tuple}
    kept: list[str] = []
    values: dict[str, list[str]] = {}
    into = kept
    for word in flags:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            field = name.removeprefix("--").replace("-", "_")
            into = values.setdefault(field, []) if field in lists else kept
            if field in lists:
                into += [value] if equals else []
                continue
        into.append(word)
    return [*kept, *(word for field, given in values.items() for word in (f"--{field}", *given))]


def flags_of_file(path: Path, config_class: type) -> list[str]:
    """The flags that a YAML file stands for. Raises InputError naming the file and an unknown key's closest match."""
    try:
        fields = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not valid YAML: {error}") from None
    if fields is None:
        return []
    if not isinstance(fields, Mapping):
        raise InputError(f"config file {path} must hold keys and values, not {type(fields).__name__}")
    return _flags(fields, config_class, path, "")


def _flags(fields: Mapping[Any, Any], config_class: type, path: Path, prefix: str) -> list[str]:
    hints = typing.get_type_hints(config_class)
    known = {field.name: hints[field.name] for field in dataclasses.fields(config_class)}
    flags: list[str] = []
    for key, value in fields.items():
        if key not in known:
            raise InputError(f"config file {path}: unknown key {f'{prefix}{key}'!r}{_closest(str(key), known)}")
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, Mapping):
                raise InputError(f"config file {path}: {name} must hold keys and values, not {value!r}")
            assert isinstance(known[key], type)
            flags += _flags(value, known[key], path, f"{name}.")
        elif isinstance(value, Mapping):
            raise InputError(f"config file {path}: {name} must be a single value, not {dict(value)!r}")
        elif isinstance(value, bool):
            flags += _boolean(name, value, known[key])
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _boolean(name: str, value: bool, hint: object) -> list[str]:
    """tyro knows `--flag` and `--no-flag` for a bool, and `--flag True` for an optional one."""
    if isinstance(hint, types.UnionType):
        return [f"--{name}", str(value)]
    head, _, last = name.rpartition(".")
    return [f"--{name}" if value else f"--{head}{'.' if head else ''}no-{last}"]


def _closest(word: str, known: Mapping[str, object]) -> str:
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"
