"""Lookup of the launch configurations that `genssd tune` measured, which the file of tune_file.py keeps.

The file is read once per process; a lookup afterwards is one of a dict.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch

from genssd.kernels.tune_file import (
    PACKAGES,
    Card,
    Configuration,
    Entry,
    Operator,
    Problem,
    TuneFileError,
    default_path,
    read_entries,
    row_class,
)

T = TypeVar("T")
SHIPPED_CAPABILITIES = ("sm_80", "sm_90")
"""Architectures that the shipped configurations were chosen on."""
BIT_FIELDS: Mapping[Operator, tuple[str, ...] | None] = {
    "score": ("block_v", "splits", "library"),
    "logits": ("block_v", "library"),
    "draw": ("split", "block", "num_warps"),
    "filter": None,
    "attention": None,
    "cross_entropy": None,
    "divergence": None,
}
"""Entries of a configuration in which all classes of rows must agree for equal bits; None: in all of them."""

log = logging.getLogger(__name__)
_deterministic: ContextVar[bool] = ContextVar("deterministic", default=True)


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
