"""Which settings decide the result of a run, and the comparison of a resumed run's settings with the recorded ones.

Every field of a config counts for the result. A declaration that says otherwise is the only exception:

    device: Operational[str | None] = None     decides where or how fast the work is done, not what comes out
    pick: Recomputed[Pick] = ...               is applied anew to the finished journal at every call
    teacher: ModelPath[str]                   counts by the fingerprint of the model that it names
    eval_data: DataFile[str]                  counts by the content of the file that it names

A declaration also says which other fields name a file or directory, `FileName[...]`, so that `~` is expanded there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from genssd.distill.files.rows import hash_content
from genssd.distill.runs.field_kinds import Kind, fields_of
from genssd.engine.checkpoints.checkpoint import fingerprint, locate
from genssd.engine.common.errors import InputError

if TYPE_CHECKING:
    pass


def settings_of(config: Any, fingerprints: Mapping[Any, str] | None = None) -> dict[str, Any]:
    """Return the settings that decide the result of a run, by dotted name, as JSON reads them back.

    A model or a data file is {"name": ..., "content": ...}, where content is what counts. fingerprints: those of models
    that are loaded already, by field name; others are computed. Raises CheckpointError on a model that does not exist,
    InputError on a data file that cannot be read.
    """
    loaded = fingerprints or {}
    settings: dict[str, Any] = {}
    for setting in fields_of(config):
        value = setting.value
        if setting.kind is Kind.MODEL and value is not None:
            content = loaded.get(setting.name) or _each(value, lambda name: fingerprint(locate(name)))
            value = {"name": value, "content": content}
        elif setting.kind is Kind.NAMED_MODEL and value is not None:
            value = {"name": value, "content": _each(value, lambda name: f"{name} {fingerprint(locate(name))}")}
        elif setting.kind is Kind.DATA_FILE and value is not None:
            value = {"name": value, "content": _each(value, hash_content)}
        elif setting.kind in (Kind.OPERATIONAL, Kind.RECOMPUTED):
            continue
        settings[setting.name] = json.loads(json.dumps(value))
    return settings


def check_same_settings(begun: Mapping[str, Any], now: Mapping[str, Any], subject: str) -> None:
    """Raise InputError naming the first setting in which a resumed run differs from how it was begun.

    subject: the beginning of the message, such as "runs/select was begun".
    """
    if begun.keys() != now.keys():
        name = next(name for name in {**begun, **now} if name not in begun or name not in now)
        raise InputError(
            f"{subject} by another version of genssd, for which {name} is {'a' if name in begun else 'no'} setting; "
            "choose another output_dir"
        )
    for name in now:
        before, after = begun[name], now[name]
        if _content(before) != _content(after):
            raise InputError(
                f"{subject} with {name}={_shown(before)}, not {_shown(after)}; resume with the same settings, or "
                "choose another output_dir"
            )


def _each(names: str | Sequence[str], identify: Callable[[str], str]) -> str | list[str]:
    return identify(names) if isinstance(names, str) else [identify(name) for name in names]


def _content(value: Any) -> Any:
    """Return the part of a setting that is compared."""
    return value["content"] if isinstance(value, dict) and value.keys() == {"name", "content"} else value


def _shown(value: Any) -> str:
    """Return a setting as messages show it: a model or a file by its name and, in parentheses, its content."""
    return repr(value) if _content(value) is value else f"{value['name']!r} ({value['content']})"
