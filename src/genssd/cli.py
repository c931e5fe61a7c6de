"""The command line: `genssd COMMAND [--config FILE.yaml] [--flag value ...]`.

A command is a config dataclass and the function that runs it. The keys of a YAML file become flags before the typed
ones, so both are checked in the same way and a typed flag wins. Bad input ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import re
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
from genssd.engine.machine import available_memory

SUMMARIES = {
    "demo": "the whole job on the small pair that ships with genssd: select, train, evaluate, compare",
    "select": "let the student choose what the teacher writes: problems in, selected trajectories out",
    "score": "criteria over finished traces: columns, the best response per prompt, a ranking of teachers",
    "reselect": "another criterion over the decisions of a finished search; preference pairs, stepwise rows",
    "generate": "responses without selection: standard distillation, pools for score; or token by token (RSD)",
    "prefix": "the shortest prefix of a trace that the student can continue by itself (P-ALIGN)",
    "leaf": "training rows without the words that distract the student (LeaF)",
    "train": "fine-tune the student on selected trajectories",
    "distill": "rounds of select and train: the trained student chooses in the next round",
    "evaluate": "measure a model's accuracy on problems with known answers",
    "diagnose": "where which teacher, loss or context would help the student, before anything is trained",
    "tune": "measure the fastest kernel configurations on this GPU for some models, once",
}

USAGE = "\n".join(
    [
        "usage: genssd COMMAND [--config FILE.yaml] [--flag value ...]",
        "",
        *(f"  {name:<10}{summary}" for name, summary in SUMMARIES.items()),
        "",
        "`genssd COMMAND --help` lists the flags of a command.",
    ]
)


OPENMP_SETTINGS = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
"""Settings of GNU's and of Intel's OpenMP library with which threads that wait for work sleep."""

OUT_OF_MEMORY = re.compile("allocate memory|out of memory|failed to map segment", re.IGNORECASE)
"""Messages of errors that mean refused memory: those of Python, torch and CUDA, and of a library that is loaded."""

JSON_KEYS = frozenset(("chat_template_kwargs",))
"""Keys whose value may be an object in a YAML file; its flag takes the JSON text of an object."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 0, with 2 on bad input, with 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if words else 2)
    command, *flags = words
    if command == "--version":
        print(f"genssd {genssd.__version__}")
        return
    _let_idle_threads_sleep()
    try:
        _run(command, flags)
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
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if not _is_out_of_memory(error):
            raise
        print(f"genssd: {_describe_memory_error(str(error))}", file=sys.stderr)
        sys.exit(2)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory was refused: Python's, that of a library, of torch, or of CUDA."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def _describe_memory_error(message: str) -> str:
    """Return one line about memory that was refused. message: that of the error, which may be empty."""
    reason = f"out of memory{f': {message.strip().splitlines()[0]}' if message.strip() else ''}"
    remedy = "raise the limit (ulimit -v, the container's), or take smaller batches or models"
    try:
        return f"{reason}; {available_memory():,} bytes of memory are left for this process: {remedy}"
    except MemoryError:
        return f"{reason}; {remedy}"


def _run(command: str, flags: list[str]) -> None:
    """Read the config of a command from its flags, and run the command."""
    if command not in SUMMARIES:
        raise InputError(f"unknown command {command!r}{_closest(command, SUMMARIES)}\n{USAGE}")
    _quiet_libraries()
    _show_log()
    commands = import_module("genssd.commands")
    config_class, _ = commands.COMMANDS[command]
    file, flags = _split_config_file(flags)
    flags_from_file = [] if file is None else flags_of_file(file, config_class)
    config = tyro.cli(
        config_class,
        prog=f"genssd {command}",
        args=[*flags_from_file, *merge_list_flags(flags, config_class)],
        description=config_class.__doc__,
    )
    commands.run_command(command, config, Console(stderr=True))


class _StderrHandler(logging.Handler):
    """A handler that prints every record as one line on the stderr of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"genssd: {record.getMessage()}", file=sys.stderr)


def _show_log() -> None:
    """Print what genssd logs: the kernel configurations that an engine takes on a GPU, and unusable tune files."""
    log = logging.getLogger("genssd")
    if not log.handlers:
        log.addHandler(_StderrHandler())
        log.setLevel(logging.INFO)


def _let_idle_threads_sleep() -> None:
    """Set the environment so that OpenMP threads without work leave their core, unless the user has decided otherwise.

    By default they wait in a loop, which on a busy machine takes the time of the threads that work. Has no effect once
    torch is imported.
    """
    if not {*OPENMP_SETTINGS, "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(OPENMP_SETTINGS)


def _quiet_libraries() -> None:
    """Silence the progress bars and warnings of transformers and datasets, before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.captureWarnings(True)
    import_module("transformers").utils.logging.disable_progress_bar()


def _split_config_file(flags: list[str]) -> tuple[Path | None, list[str]]:
    """Return the FILE of `--config FILE`, if there is one, and the other flags."""
    for i, flag in enumerate(flags):
        if flag == "--config":
            if i + 1 == len(flags):
                raise InputError("--config needs a file")
            return Path(os.path.expanduser(flags[i + 1])), flags[:i] + flags[i + 2 :]
        if flag.startswith("--config="):
            return Path(os.path.expanduser(flag.removeprefix("--config="))), flags[:i] + flags[i + 1 :]
    return None, flags


def merge_list_flags(flags: Sequence[str], config_class: type) -> list[str]:
    """Merge repeated flags of list fields into one: `--data a --data b` becomes `--data a b`."""
    hints = typing.get_type_hints(config_class)
    list_fields = {name for name, hint in hints.items() if typing.get_origin(hint) is tuple}
    other: list[str] = []
    values: dict[str, list[str]] = {}
    target = other
    for word in flags:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            field = name.removeprefix("--").replace("-", "_")
            target = values.setdefault(field, []) if field in list_fields else other
            if field in list_fields:
                target += [value] if equals else []
                continue
        target.append(word)
    return [*other, *(word for field, words in values.items() for word in (f"--{field}", *words))]


def flags_of_file(path: Path, config_class: type) -> list[str]:
    """Return the flags that a YAML file stands for.

    Raises InputError naming the file and, for an unknown key, the closest known one.
    """
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
        elif isinstance(value, Mapping) and key in JSON_KEYS:
            flags += [f"--{name}", json.dumps(value)]
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
    """Return the flag of a boolean as tyro reads it: `--flag` or `--no-flag`, and `--flag True` for an optional one."""
    if isinstance(hint, types.UnionType):
        return [f"--{name}", str(value)]
    head, _, last = name.rpartition(".")
    return [f"--{name}" if value else f"--{head}{'.' if head else ''}no-{last}"]


def _closest(word: str, known: Mapping[str, object]) -> str:
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"
