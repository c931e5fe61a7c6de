"""The file of the launch configurations that `genssd tune` measured: its records, and how it is read and written.

The file is JSON. An entry is the result for one operator and one shape on one card with certain versions:

    {"card": "NVIDIA H200", "capability": "sm_90", "versions": {"genssd": ..., "torch": ..., "triton": ...},
     "operator": "score", "dtype": "bfloat16", "shape": [151936, 4096],
     "deterministic": {"1..64": {"block_n": 64, ...}, "65..128": ..., "129..512": ..., "513..": ...},
     "fastest": {...}, "microseconds": {...}}

Shapes: score, logits and cross_entropy [vocabulary, model width], draw and filter [vocabulary], attention [heads,
kv heads, head dim], divergence [smaller vocabulary, student's width, teacher's width].
A configuration may decide the last bits of a result. So `deterministic` holds configurations that agree in everything
that does, for every number of rows, and `fastest` the fastest ones for each class of numbers of rows.
tuned.py looks configurations up.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Operator = Literal["score", "logits", "draw", "filter", "attention", "cross_entropy", "divergence"]
"""Kernels that are tuned: statistics of targets, logits of a head, the pass over logits that draws, the passes that
filter logits and draw, paged attention, and the losses under one head and between two, with their gradients."""
Configuration = Mapping[str, int]
"""Values of one launch configuration by name; some are booleans."""

FORMAT = "genssd tune 1"
FILE_VARIABLE = "GENSSD_TUNE_FILE"
PACKAGES = ("genssd", "torch", "triton")
ROW_LIMITS = (64, 128, 512)
"""Largest number of rows of every class but the last, which has no limit."""
ROW_CLASSES = ("1..64", "65..128", "129..512", "513..")
SAMPLE_ROWS = (*ROW_LIMITS, ROW_LIMITS[-1] + 1)
"""A number of rows of every class."""
HEAD_OPERATORS: tuple[Operator, ...] = ("score", "logits")
"""Operators that multiply hidden states with a head."""
LOSS_OPERATORS: tuple[Operator, ...] = ("cross_entropy", "divergence")
"""Operators of a training, which compute a loss and its gradients; their calls take many milliseconds."""
MODES = ("deterministic", "fastest")


class TuneFileError(ValueError):
    """Error raised for a tune file that cannot be read or written, or does not hold what `genssd tune` writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A GPU and the versions of the software on it; what was measured on one holds for no other.

    capability: "sm_90", or the architecture of an AMD GPU. versions: those of PACKAGES, in this order.
    """

    name: str
    capability: str
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """An operator at one shape. dtype: name of the dtype of its inputs, such as "bfloat16"."""

    operator: Operator
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Winners of one problem, each one configuration per class of ROW_CLASSES.

    deterministic: None where no configuration gives the same bits for all numbers of rows. microseconds: time of every
    fastest configuration, for the reader of the file.
    """

    deterministic: tuple[Configuration, ...] | None
    fastest: tuple[Configuration, ...]
    microseconds: tuple[float, ...] = ()


def row_class(rows: int) -> int:
    """Return the index in ROW_CLASSES of a number of rows."""
    return bisect_left(ROW_LIMITS, rows)


def default_path() -> Path:
    """Return the tune file of this process: $GENSSD_TUNE_FILE, or genssd/tune.json in the user's cache directory."""
    if path := os.environ.get(FILE_VARIABLE):
        return Path(os.path.expanduser(path))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "genssd" / "tune.json"


def read_entries(path: Path) -> list[tuple[Card, Problem, Entry]]:
    """Return all entries of a tune file, none of a file that does not exist. Raises TuneFileError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TuneFileError(f"tune file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise TuneFileError(f"tune file {path} is not valid JSON") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("entries"), list):
        raise TuneFileError(f"tune file {path} was not written by this version of `genssd tune`")
    entries = []
    for index, fields in enumerate(content["entries"]):
        try:
            entries.append(_read_entry(fields))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TuneFileError(f"tune file {path}: entry {index} is damaged ({error!r})") from None
    return entries


def _read_entry(fields: Any) -> tuple[Card, Problem, Entry]:
    """Return one entry of the file.

    Raises AttributeError, KeyError, TypeError or ValueError where it is not as `_write_entry` writes it.
    """
    if fields["operator"] not in get_args(Operator):
        raise ValueError(f"operator {fields['operator']!r}")
    versions = tuple(str(fields["versions"][package]) for package in PACKAGES)
    card = Card(name=str(fields["card"]), capability=str(fields["capability"]), versions=versions)
    shape = tuple(int(size) for size in fields["shape"])
    problem = Problem(operator=fields["operator"], dtype=str(fields["dtype"]), shape=shape)
    deterministic, fastest = (_read_classes(fields[mode]) for mode in MODES)
    if fastest is None:
        raise ValueError("fastest is null")
    microseconds = tuple(map(float, fields["microseconds"].values()))
    return card, problem, Entry(deterministic=deterministic, fastest=fastest, microseconds=microseconds)


def _read_classes(classes: Any) -> tuple[Configuration, ...] | None:
    if classes is None:
        return None
    for configuration in classes.values():
        if not all(isinstance(name, str) and isinstance(value, int) for name, value in configuration.items()):
            raise ValueError("a configuration has a value that is no integer")
    return tuple(classes[name] for name in ROW_CLASSES)


def add_entries(path: Path, card: Card, entries: Mapping[Problem, Entry]) -> None:
    """Add the winners of some problems to a tune file, in place of those of the same card, versions and problems.

    The file is replaced in one step, and processes that add at the same time wait for each other. Raises TuneFileError
    where the file cannot be written, or is not one of `genssd tune`, which is then left as it is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            merged = {(other, problem): entry for other, problem, entry in read_entries(path)}
            merged |= {(card, problem): entry for problem, entry in entries.items()}
            rows = [_write_entry(*key, entry) for key, entry in merged.items()]
            _replace(path, json.dumps({"format": FORMAT, "entries": rows}, indent=1) + "\n")
    except OSError as error:
        raise TuneFileError(f"tune file {path} cannot be written: {error.strerror}") from None


def _write_entry(card: Card, problem: Problem, entry: Entry) -> dict[str, Any]:
    def by_class(values: Sequence[Any] | None) -> dict[str, Any] | None:
        return None if values is None else dict(zip(ROW_CLASSES, values, strict=False))

    return {
        "card": card.name,
        "capability": card.capability,
        "versions": dict(zip(PACKAGES, card.versions, strict=True)),
        "operator": problem.operator,
        "dtype": problem.dtype,
        "shape": list(problem.shape),
        "deterministic": by_class(entry.deterministic),
        "fastest": by_class(entry.fastest),
        "microseconds": by_class(entry.microseconds),
    }


def _replace(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old one or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new entry survives a loss of power
    finally:
        os.close(directory)
