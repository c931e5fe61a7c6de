"""Names of files and models in typed flags, checked before the commands are imported, which takes seconds.

What is refused here the command refuses with the same words. Most values of a config file are left to it. Of the config
file that the doctor examines, the names are checked as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from genssd.distill.files.cluster_files import is_for_cluster
from genssd.distill.files.rows import check_exists
from genssd.distill.runs.directory import check_claimable, require_resume
from genssd.distill.runs.journal import has_lines, read_json
from genssd.distill.runs.output_files import JOURNALS
from genssd.distill.runs.record import check_directory
from genssd.engine.checkpoints.address import is_url, parse_url
from genssd.engine.checkpoints.model_names import find_directory

MODELS = frozenset(
    (
        "teacher",
        "student",
        "model",
        "model-name-or-path",
        "teacher-model-name-or-path",
        "train.teacher-model-name-or-path",
    )
)
"""Flags that name a model, or several."""
DATA_FILES = frozenset(("data", "eval-data", "calibrate.data", "select.calibrate.data", "train.eval-data"))
"""Flags that name a data file, or several."""
TOKENIZERS = frozenset(("teacher-tokenizer", "select.teacher-tokenizer"))
"""Flags that name a directory or hub id with a tokenizer."""
CLUSTERS = frozenset(("ray", "select.ray", "config"))
"""Flags with which a command may have a cluster, which reads names that this process does not."""
UNCHECKED = frozenset(("output-dir", "output", "run", "resume-from-checkpoint", "tune-file", "table", "config"))
"""Flags that name files and directories of a run."""


def check_names(flags: Sequence[str]) -> None:
    """Raise CheckpointError or InputError where a typed flag names a model directory or a data file that is not there.

    Of a flag that is typed several times only the last counts, as it does where it takes one value.
    """
    if {"-h", "--help"} & {*flags}:
        return
    typed = _split(flags)
    may_have_cluster = not typed.keys().isdisjoint(CLUSTERS)
    for flag, values in typed.items():
        for value in values:
            if value == "None" or (flag in DATA_FILES and may_have_cluster and is_for_cluster(value)):
                continue
            if flag == "teacher" and is_url(value):
                parse_url(value)
            elif flag in MODELS | TOKENIZERS:
                find_directory(os.path.expanduser(value))
            elif flag in DATA_FILES:
                check_exists(os.path.expanduser(value))


def check_runs(config: object) -> None:
    """Raise InputError where the output directory of a run that a command reads is not there."""
    named: str | Sequence[str] | None = getattr(config, "run", None)
    for name in [named] if isinstance(named, str) else named or ():
        check_directory(Path(os.path.expanduser(name)))


def check_output(command: str, config: object) -> None:
    """Raise InputError where the output directory of a training, or of a command with a journal, is in use, belongs to
    another command, or has a journal that the config does not ask to go on with.

    A directory that cannot be examined passes: the command says of it what is wrong.
    """
    if command not in JOURNALS and command != "train":
        return
    directory = Path(os.path.expanduser(getattr(config, "output_dir", "")))
    with suppress(OSError):
        if not directory.is_dir():
            return
        check_claimable(directory, command)
        journal = directory / JOURNALS.get(command, "")
        if command in JOURNALS and not getattr(config, "overwrite", False) and has_lines(journal):
            require_resume(config, journal)


def check_examined(flags: Sequence[str]) -> None:
    """Raise CheckpointError or InputError where the config file or the run that the doctor examines cannot be read, or
    names models or data that are not there. flags: the doctor's own.
    """
    if {"-h", "--help"} & {*flags}:
        return
    values = _split(flags)
    for name in values.get("config", ())[:1]:
        fields = import_module("genssd.yaml_files").load_yaml(Path(os.path.expanduser(name)))
        check_names(list(_iter_words(fields, "")))
    for name in values.get("run", ())[:1]:
        read_json(Path(os.path.expanduser(name)) / "run.json")


def _iter_words(fields: object, prefix: str) -> Iterator[str]:
    """Yield the values of a config file that may name something, as flags."""
    for key, value in fields.items() if isinstance(fields, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _iter_words(value, f"{prefix}{key}.")
        elif isinstance(value, str | list):
            yield from (f"--{prefix}{key}", *map(str, [value] if isinstance(value, str) else value))


def _split(flags: Sequence[str]) -> Mapping[str, list[str]]:
    """Return the values of every flag where it is typed last."""
    values: dict[str, list[str]] = {}
    current: list[str] = []
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            current = values[name.replace("_", "-")] = [value] if equals else []
        else:
            current.append(word)
    return values
