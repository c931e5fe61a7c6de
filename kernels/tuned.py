"""Launch configurations that `genssd tune` measured: the file that keeps them, and the lookup of the kernels.

The file is JSON. An entry is the result for one operator and one shape on one card with certain versions:

    {"card": "NVIDIA H200", "capability": "sm_90", "versions": {"genssd": ..., "torch": ..., "triton": ...},
     "operator": "score", "dtype": "bfloat16", "shape": [151936, 4096],
     "deterministic": {"1..64": {"block_n": 64, ...}, "65..128": ..., "129..512": ..., "513..": ...},
     "fastest": {...}, "microseconds": {...}}

Shapes: score and logits [vocabulary, model width], draw [vocabulary], attention [heads, kv heads, head dim].
A configuration may decide the last bits of a result. So `deterministic` holds configurations that agree in everything
that does, for every number of rows, and `fastest` the fastest ones for each class of numbers of rows. The file is read
once per process; a lookup afterwards is one of a dict.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import logging
import os
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast, get_args

import torch

T = TypeVar("T")
Operator = Literal["score", "logits", "draw", "attention"]
"""Kernels that are tuned: statistics of targets, logits of a head, the pass over logits that draws, paged attention."""
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
MODES = ("deterministic", "fastest")
SHIPPED_CAPABILITIES = ("sm_80", "sm_90")
"""Architectures that the shipped configurations were chosen on."""
BIT_FIELDS: Mapping[Operator, tuple[str, ...] | None] = {
    "score": ("block_v", "splits", "library"),
    "logits": ("block_v", "library"),
    "draw": ("split", "block", "num_warps"),
    "attention": None,
}
"""Entries of a configuration in which all classes of rows must agree for equal bits; None: in all of them."""

log = logging.getLogger(__name__)
_deterministic: ContextVar[bool] = ContextVar("deterministic", default=True)


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


def find_disagreement(operator: Operator, configurations: Sequence[Configuration]) -> str | None:
    """Return why configurations, one per class of rows, may give a row different bits; None where they may not."""
    if any(configuration.get("library") for configuration in configurations):
        return "the library's product depends on the number of rows"
    fields = BIT_FIELDS[operator] or tuple(configurations[0])
    for field in fields:
        values = [configuration.get(field) for configuration in configurations]
        if any(value != values[0] for value in values):
            return f"its classes of rows have different values of {field}: {', '.join(map(str, values))}"
    return None


@contextmanager
def launch_mode(*, deterministic: bool) -> Iterator[None]:
    """Let the kernels that are launched inside the block take deterministic or the fastest configurations."""
    token = _deterministic.set(deterministic)
    try:
        yield
    finally:
        _deterministic.reset(token)


def is_deterministic() -> bool:
    """Return whether kernels take configurations that give a row the same bits for every number of rows."""
    return _deterministic.get()


def default_path() -> Path:
    """Return the tune file of this process: $GENSSD_TUNE_FILE, or genssd/tune.json in the user's cache directory."""
    if path := os.environ.get(FILE_VARIABLE):
        return Path(os.path.expanduser(path))
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "genssd" / "tune.json"


@functools.cache
def card_of(device: torch.device) -> Card:
    """Return the card of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    is_amd = torch.version.hip is not None
    capability = str(properties.gcnArchName) if is_amd else f"sm_{10 * properties.major + properties.minor}"
    return Card(name=properties.name, capability=capability, versions=tuple(map(_version_of, PACKAGES)))


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


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


@functools.cache
def load_entries(path: Path, card: Card) -> Mapping[Problem, Entry]:
    """Return the entries of a tune file for a card and its versions; read once per process.

    A file that cannot be used is one warning, and has no entries.
    """
    try:
        entries = read_entries(path)
    except TuneFileError as error:
        log.warning("%s; shipped launch configurations are used. Delete it, and run `genssd tune` again", error)
        return {}
    matching = {problem: entry for other, problem, entry in entries if other == card}
    if not matching and any(other.name == card.name for other, _, _ in entries):
        log.warning("tune file %s was measured with other versions on this card: run `genssd tune` again", path)
    return matching


@functools.cache
def _configurations(
    operator: Operator,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    deterministic: bool,
    build: Callable[[Configuration], T],
) -> tuple[T, ...] | None:
    """Return what `build` makes of the configuration of every class of rows; None where the file has none to use."""
    path = default_path()
    problem = Problem(operator=operator, dtype=name_of(dtype), shape=shape)
    entry = load_entries(path, card_of(device)).get(problem)
    values = None if entry is None else entry.deterministic if deterministic else entry.fastest
    if values is None:
        return None
    name = f"tune file {path}: {operator} of {list(shape)}"
    reason = find_disagreement(operator, values) if deterministic else None
    if reason is not None:
        log.warning("%s is not used with deterministic=True: %s", name, reason)
        return None
    try:
        return tuple(map(build, values))
    except (TypeError, ValueError) as error:
        log.warning("%s is not used: %s. Run `genssd tune` again", name, error)
        return None


def find(
    operator: Operator,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
    rows: int,
    build: Callable[[Configuration], T],
) -> T | None:
    """Return what `build` makes of the tuned configuration of an operator for a number of rows, in the block's mode.

    None where the file has none for this card. build: a function at the top of a module, which raises ValueError on
    values that it cannot use; it is called once per process and configuration.
    """
    configurations = _configurations(operator, dtype, shape, device, is_deterministic(), build)
    return None if configurations is None else configurations[row_class(rows)]


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def forget() -> None:
    """Read the tune file again at the next lookup."""
    load_entries.cache_clear()
    _configurations.cache_clear()


def build_from(cls: type[T], values: Configuration, parts: Mapping[str, type[Any]] = MappingProxyType({})) -> T:
    """Return a dataclass of integers and booleans from the values of its fields.

    parts: names of fields that are such dataclasses themselves, with their classes; their values lie among the others.
    Raises ValueError on a value that is missing, unknown, of another type or below 1, and on a size of a tile or a
    number of warps that is no power of two.
    """
    fields: dict[str, dataclasses.Field[Any]] = {}
    for owner in (*parts.values(), cls):
        fields |= {f.name: f for f in dataclasses.fields(owner) if f.name not in parts}
    if values.keys() != fields.keys():
        raise ValueError(f"it must have {', '.join(fields)}, not {', '.join(values)}")
    for name, field in fields.items():
        _check_value(name, values[name], is_boolean=field.type in (bool, "bool"))

    def make(owner: type[Any]) -> Any:
        own = {f.name: values[f.name] for f in dataclasses.fields(owner) if f.name not in parts}
        return owner(**own, **({name: make(part) for name, part in parts.items()} if owner is cls else {}))

    return cast(T, make(cls))


def _check_value(name: str, value: object, *, is_boolean: bool) -> None:
    if is_boolean:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r}")
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be at least 1, not {value!r}")
    if (name.startswith("block") or name.endswith(("_m", "_warps"))) and value & (value - 1):
        raise ValueError(f"{name} must be a power of two, not {value}")
