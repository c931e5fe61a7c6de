"""The flags of a command: those that are typed, and those that a YAML file stands for, as the command's config."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from genssd.engine.common.closest import suggest, suggest_or_list
from genssd.engine.common.errors import InputError
from genssd.escapes import read_escapes
from genssd.field_names import name_ours
from genssd.flag_list import list_flags
from genssd.yaml_files import load_yaml

JSON_KEYS = frozenset(("chat_template_kwargs", "teacher_template_kwargs", "student_template_kwargs"))
"""Keys whose value may be an object in a YAML file; its flag takes the JSON text of an object."""
MAX_CONFIG_VALUES = 10_000
"""Maximum number of values in a config file, those that aliases repeat included."""
RECORD_KEYS = frozenset(("command", "config", "settings"))
"""Keys that make a file the record of a run, run.json."""
PLACEHOLDER = "to-be-given"
"""Value of required fields that are not given, where the settings are only printed."""
CHOICE = re.compile(r"invalid choice '(.*)' for argument .*Expected one of \((.*)\)")
"""Message on a value that is none of an option's, with the value and the list of those."""
BARE = {"--ray": "local", "--select.ray": "local"}
"""Flags that may stand without a value, and the value that they then have."""
RULER = re.compile(r"[\s\-\u2500-\u257f]*")
HELP_SECTIONS = ("For full helptext", "Argument helptext")
"""Beginnings of the sections of tyro's messages that only describe flags."""
MISSING = "Missing from"
"""Beginning of the section that lists flags, each with its help text below it, which are not given."""
WIDE = 10_000


def read_config(command: str, flags: Sequence[str], config_class: type) -> Any:
    """Return the config of a command. Raises InputError on flags or a config file that cannot be read."""
    _, file, typed = _find_config_file(_complete_bare(flags), config_class)
    from_file = [] if file is None else flags_of_file(file, config_class, command)
    _check_names(typed, command, config_class)
    typed = merge_list_flags(read_escapes(typed), config_class)
    words = _join(from_file, typed, _find_positional(config_class))
    _check_one_teacher(words, config_class)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _terminal_width(WIDE):
            return tyro.cli(config_class, prog=f"genssd {command}", args=words, add_help=False)
    except SystemExit:
        message = _shorten(said.getvalue(), config_class)
        raise _point_to_help(message, command) from None


def _complete_bare(words: Sequence[str]) -> list[str]:
    """Return the words with the values of flags that stand without one."""
    completed: list[str] = []
    for word, following in itertools.zip_longest(words, words[1:]):
        completed.append(word)
        if word in BARE and (following is None or following.startswith("--")):
            completed.append(BARE[word])
    return completed


def _point_to_help(message: str, command: str) -> InputError:
    return InputError(f"{message}{'' if message.endswith('?') else ';'} `genssd {command} --help` lists the flags")


def _check_names(words: Sequence[str], command: str, config_class: type) -> None:
    """Raise InputError on the first flag that a command does not have, with the closest one that it has."""
    names = _list_names(config_class)
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if word.startswith("--") and name not in names:
            raise _point_to_help(f"unknown flag {name}{name_ours(name, names) or suggest(name, names)}", command)


def _list_names(config_class: type) -> list[str]:
    """Return the flags of a command as they are typed."""
    return [name for flag in list_flags(config_class) for name in flag.names]


def read_incomplete(command: str, flags: Sequence[str], config_class: type) -> tuple[Any, frozenset[str]]:
    """Return the config of a command, and the names of required fields that the flags leave out.

    Those have a placeholder in the config. Raises InputError as `read_config` does, and of a command that has an option
    `config` of its own, for which no file stands.
    """
    has_own, file, typed = _find_config_file(list(flags), config_class)
    if has_own:
        raise InputError(f"`genssd {command}` reads no config file of its own options")
    words = [*([] if file is None else flags_of_file(file, config_class, command)), *typed]
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    positional = _find_positional(config_class)
    if positional is not None and typed and not typed[0].startswith("-"):
        given.add(positional)
    missing = frozenset(flag.name for flag in list_flags(config_class) if flag.is_required and flag.name not in given)
    filled = [word for name in sorted(missing) for word in (f"--{name}", PLACEHOLDER)]
    return read_config(command, [*flags, *filled], config_class), missing


def _find_config_file(flags: list[str], config_class: type) -> tuple[bool, Path | None, list[str]]:
    """Return whether a command has an option `config` of its own, the config file of its flags, and the other flags."""
    has_own = "config" in {field.name for field in dataclasses.fields(config_class)}
    file, typed = (None, flags) if has_own else _split_config_file(flags)
    return has_own, file, typed


@contextlib.contextmanager
def _terminal_width(columns: int) -> Iterator[None]:
    """Let tyro believe that the terminal is so wide, so that it breaks no lines."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _shorten(said: str, config_class: type) -> str:
    """Return tyro's message, a frame with a title and sections between rulers, as one line."""
    sections: list[list[str]] = [[]]
    for line in said.splitlines()[1:]:  # the first one is the title
        if RULER.fullmatch(line):
            sections.append([])
        else:
            sections[-1].append(" ".join(line.strip(" \u2502").split()))
    texts = [
        " ".join(line for line in lines if line.startswith(("--", MISSING)) or not lines[0].startswith(MISSING))
        for lines in sections
        if lines and not lines[0].startswith(HELP_SECTIONS)
    ]
    texts = [text.replace("|{[STR [STR ...]]}", " ...") for text in texts]  # of one value or several
    message = "; ".join(text.removesuffix(".") for text in texts).removeprefix(
        f"Error parsing {config_class.__name__}: "
    )
    if choice := CHOICE.search(message):
        message += suggest(choice[1], [name.strip(" '") for name in choice[2].split(",")])
    return message or "these flags cannot be read"


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
    list_fields = {name for name, hint in hints.items() if _takes_list(hint)}
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


def _takes_list(hint: Any) -> bool:
    """Return whether a field takes a list of values, alone or beside a single one."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(kind) is tuple for kind in kinds)


def _check_one_teacher(words: Sequence[str], config_class: type) -> None:
    """Raise InputError where several teachers are given to a command that takes one."""
    hint = typing.get_type_hints(config_class).get("teacher")
    if hint is None or _takes_list(hint):
        return
    values, _ = _take_values([*words], "--teacher")
    if len(values) > 1:
        raise InputError(
            f"--teacher takes one model here, not {' '.join(values)}: several teachers compete in `genssd select` alone"
        )


def _join(from_file: list[str], typed: list[str], positional: str | None) -> list[str]:
    """Return the words of a config file and those that are typed after them, so that these win.

    positional: field whose values are words without a flag, which come first; those of the file count where none are
    typed.
    """
    if positional is None:
        return [*from_file, *typed]
    of_file, rest = _take_values(from_file, f"--{positional}")
    of_typed, others = _take_values(typed, f"--{positional}")
    first = list(itertools.takewhile(lambda word: not word.startswith("-"), others))
    return [*([*first, *of_typed] or of_file), *rest, *others[len(first) :]]


def _take_values(words: list[str], flag: str) -> tuple[list[str], list[str]]:
    """Return the values of a flag, and the words without it and them."""
    if flag not in words:
        return [], words
    start = words.index(flag)
    end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
    return words[start + 1 : end], words[:start] + words[end:]


def _find_positional(config_class: type) -> str | None:
    """Return the field whose values are words without a flag; None where the config has none."""
    (mark,) = tyro.conf.Positional[int].__metadata__  # type: ignore[attr-defined]
    hints = typing.get_type_hints(config_class, include_extras=True)
    return next((name for name, hint in hints.items() if mark in getattr(hint, "__metadata__", ())), None)


def flags_of_file(path: Path, config_class: type, command: str) -> list[str]:
    """Return the flags that a YAML file, or the run.json of a run of the command, stands for.

    Raises InputError naming the file and, for an unknown key, the closest known one; and on a run of another command.
    """
    fields = load_yaml(path)
    if fields is None:
        return []
    if not isinstance(fields, Mapping):
        raise InputError(f"config file {path} must hold keys and values, not {type(fields).__name__}")
    if sum(1 for _ in zip(range(MAX_CONFIG_VALUES), _walk(fields), strict=False)) == MAX_CONFIG_VALUES:
        raise InputError(f"config file {path} holds more than {MAX_CONFIG_VALUES} values")
    if fields.keys() >= RECORD_KEYS:
        if fields["command"] != command:
            raise InputError(
                f"config file {path} is the record of a run of `genssd {fields['command']}`, not of `genssd {command}`"
            )
        fields = fields["config"] if isinstance(fields["config"], Mapping) else {}
    return _flags(fields, config_class, path, "")


def _walk(value: object) -> Iterator[object]:
    """Yield all values in a value, once for every path that leads to them: aliases may make them very many."""
    stack = [value]
    while stack:
        yield (top := stack.pop())
        if isinstance(top, Mapping):
            stack += [*top.keys(), *top.values()]
        elif isinstance(top, Sequence | set) and not isinstance(top, str | bytes):
            stack += top


def _flags(fields: Mapping[Any, Any], config_class: type, path: Path, prefix: str) -> list[str]:
    hints = typing.get_type_hints(config_class)
    known = {field.name: hints[field.name] for field in dataclasses.fields(config_class)}
    flags: list[str] = []
    for key, value in fields.items():
        if key not in known:
            ours = None if prefix else name_ours(f"--{str(key).replace('_', '-')}", _list_names(config_class))
            end = ours or suggest_or_list(str(key), known)
            raise InputError(f"config file {path}: unknown key {f'{prefix}{key}'!r}{end}")
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, Mapping):
                raise InputError(f"config file {path}: {name} must hold keys and values, not {value!r}")
            assert isinstance(known[key], type)
            flags += _flags(value, known[key], path, f"{name}.")
        elif isinstance(value, Mapping) and key in JSON_KEYS:
            flags += [f"--{name}", _dump_object(value, f"config file {path}: {name}")]
        elif isinstance(value, Mapping):
            raise InputError(f"config file {path}: {name} must be a single value, not {dict(value)!r}")
        elif isinstance(value, bool):
            flags += _boolean(name, value, known[key])
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _dump_object(value: Mapping[Any, Any], where: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):  # dates, sets, keys that are lists
        raise InputError(f"{where} must hold what JSON can express, not {value!r}") from None


def _boolean(name: str, value: bool, hint: object) -> list[str]:
    """Return the flag of a boolean as tyro reads it: `--flag` or `--no-flag`, and `--flag True` for an optional one."""
    if isinstance(hint, types.UnionType):
        return [f"--{name}", str(value)]
    head, _, last = name.rpartition(".")
    return [f"--{name}" if value else f"--{head}{'.' if head else ''}no-{last}"]
