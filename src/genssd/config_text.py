"""A command's settings as a YAML file with comments, which `--config` reads back to the same settings."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import yaml

from genssd.flag_groups import group_flags
from genssd.flag_list import Flag, list_flags, read_help
from genssd.help_text import UNDIVIDED, describe_flag

WIDTH = 120
"""Maximum number of columns of a comment."""
INDENT = "  "


def render_config(command: str, config: Any, missing: Collection[str]) -> str:
    """Return the settings of a command as YAML, each with its help text as a comment.

    missing: names of required fields that were not given; they are written as comments, to be filled in.
    """
    flags = list_flags(type(config))
    lines = [
        f"# Options of `genssd {command}`: genssd {command} --config FILE",
        "# Flags that are typed as well win. Options that are left out have their defaults.",
    ]
    written: set[str] = set()
    for title, members in group_flags(command, flags).items():
        # a nested config is one object in YAML: it is written as a whole, in the group of its own
        fields = dict.fromkeys(flag.top for flag in members if title not in UNDIVIDED or "." not in flag.name)
        fields = {field: None for field in fields if field not in written}
        written |= fields.keys()
        lines += ["", f"# {title.upper()}"] if fields else []
        for field in fields:
            lines += _write_fields(config, [flag for flag in flags if flag.top == field], missing, "")
    return "\n".join(lines) + "\n"


def _write_fields(config: Any, flags: Sequence[Flag], missing: Collection[str], prefix: str) -> Iterator[str]:
    """Yield the lines of some fields of a config. prefix: dotted name of the config, with a dot at its end."""
    indent = INDENT * prefix.count(".")
    written: set[str] = set()
    for flag in flags:
        field, dot, _ = flag.name.removeprefix(prefix).partition(".")
        if field in written:
            continue
        written.add(field)
        value = getattr(config, field)
        if dot:
            inner = f"{prefix}{field}."
            yield from _write_comment(read_help(type(config))[field], indent)
            yield f"{indent}{field}:"
            yield from _write_fields(value, [one for one in flags if one.name.startswith(inner)], missing, inner)
        else:
            yield from _write_comment(describe_flag(flag), indent)
            yield f"{indent}# {field}:" if flag.name in missing else f"{indent}{field}: {write_value(value)}"


def _write_comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(
        text, WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False, break_on_hyphens=False
    )


def write_value(value: Any) -> str:
    """Return a setting as YAML on one line; a tuple is a list."""
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").strip()
