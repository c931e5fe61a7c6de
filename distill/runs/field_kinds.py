"""What the fields of configs are: which of them decide the result of a run, and which name models and files.

Every field of a config counts for the result. A declaration that says otherwise is the only exception:

    device: Operational[str | None] = None     decides where or how fast the work is done, not what comes out
    pick: Recomputed[Pick] = ...               is applied anew to the finished journal at every call
    teacher: ModelPath[str]                   counts by the fingerprint of the model that it names
    eval_data: DataFile[str]                  counts by the content of the file that it names

A declaration also says which other fields name a file or directory, `FileName[...]`, so that `~` is expanded there.
The files of configs, this one among them, import nothing that loads torch, so that flags are read at once.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

C = TypeVar("C", bound="DataclassInstance")


class Kind(Enum):
    """How a field of a config is compared when a run is resumed."""

    OPERATIONAL = "operational"
    RECOMPUTED = "recomputed"
    MODEL = "model"
    NAMED_MODEL = "named model"
    DATA_FILE = "data file"


Operational = Annotated[T, Kind.OPERATIONAL]
"""A setting that does not change the result: device, memory, batch size, progress, where the output goes."""

Recomputed = Annotated[T, Kind.RECOMPUTED]
"""A setting of what is computed from the journal at every call; the journal itself does not depend on it."""

ModelPath = Annotated[T, Kind.MODEL]
"""The name of a model (or a tuple of names, or None), compared by the fingerprint of its checkpoint."""

NamedModelPath = Annotated[T, Kind.NAMED_MODEL]
"""A `ModelPath` whose name counts as well, because results are stored under it."""

DataFile = Annotated[T, Kind.DATA_FILE]
"""The name of a data file (or a tuple of names, or None; see files/rows.py), compared by a hash of its content."""


class Marker(Enum):
    """What a field of a config is, in addition to its kind."""

    FILE_NAME = "file name"


FileName = Annotated[T, Marker.FILE_NAME]
"""The name of a file or directory (or a tuple of names, or None) in a field of another kind, or without one."""

_NAMES = frozenset((Marker.FILE_NAME, Kind.MODEL, Kind.NAMED_MODEL, Kind.DATA_FILE))
"""Markers and kinds of the fields that name something in the file system."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field of a config, nested ones included. name: dotted, such as "sampling.temperature"."""

    name: str
    value: Any
    kind: Kind | None
    """None: the value itself counts."""


def fields_of(config: Any, prefix: str = "") -> Iterator[Setting]:
    """Yield every field of a config; a nested dataclass yields its own fields, unless its field has a kind."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        kind = next((k for k in getattr(hints[field.name], "__metadata__", ()) if isinstance(k, Kind)), None)
        if kind is None and dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{name}.")
        else:
            yield Setting(name=name, value=value, kind=kind)


def expand_home(config: C) -> C:
    """Return a config in which every name of a model, data file, file or directory has its leading `~` or `~user`
    replaced by that home directory; nested configs included."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changes[field.name] = expand_home(value)
        elif not _NAMES.isdisjoint(getattr(hints[field.name], "__metadata__", ())) and value is not None:
            is_single = isinstance(value, str)
            changes[field.name] = os.path.expanduser(value) if is_single else tuple(map(os.path.expanduser, value))
    return dataclasses.replace(config, **changes)
