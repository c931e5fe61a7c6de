"""The help of a command: its flags in groups, the required ones and those that matter most first."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from genssd.distill.runs.output_files import OUTPUTS
from genssd.engine.criteria.criterion_names import list_usages
from genssd.flag_groups import group_flags
from genssd.flag_list import Flag, list_flags

MIN_WIDTH, MAX_WIDTH = 60, 120
"""Least and largest number of columns that are written, whatever the terminal has."""
COLUMN = 34
"""Column at which the help texts begin; a longer flag has a line of its own."""
CRITERIA = ("criterion", "criteria")
"""Last part of the names of flags whose values are criteria, which are listed."""
UNDIVIDED = ("required", "main options")
"""Titles of groups in which flags of a nested config stand by themselves."""
COMMON = (
    ("--config FILE", "Read options from a YAML file, or from the run.json of a run; typed flags win."),
    ("--print-config", "Print all options as such a file, with their help texts, and end."),
    ("-h, --help", "Print this help, and end."),
)
"""Flags of every command that are no options of it."""


def render_help(command: str, config_class: type) -> str:
    """Return the help of a command, for the width of the terminal."""
    width = min(max(shutil.get_terminal_size().columns, MIN_WIDTH), MAX_WIDTH)
    flags = list_flags(config_class)
    required = " ".join(flag.spell() for flag in flags if flag.is_required)
    usage = f"usage: genssd {command} {required + ' ' if required else ''}[--flag value ...]"
    lines = [usage, "", *textwrap.wrap(inspect.cleandoc(config_class.__doc__ or "").replace("\n", " "), width)]
    has_own = any(flag.name == "config" for flag in flags)
    for title, members in group_flags(command, flags).items():
        lines += ["", f"{title}:"]
        section = ""
        for flag in members:
            if flag.section != section and title not in UNDIVIDED:
                section = flag.section
                nested = flag.name.rpartition(".")[0].replace("_", "-")
                lines += textwrap.wrap(f"{nested}: {section}", width - 2, initial_indent="  ", subsequent_indent="  ")
            lines += _format_entry(flag.spell(), describe_flag(flag), width)
    if command in OUTPUTS:
        lines += ["", "files in the output directory:"]
        for name, text in OUTPUTS[command].items():
            lines += _format_entry(name, text, width)
    lines += ["", "for every command:"]
    for words, text in COMMON[-1:] if has_own else COMMON:
        lines += _format_entry(words, text, width)
    return "\n".join(lines)


def describe_flag(flag: Flag) -> str:
    """Return the help text of a flag with its default, and the registered names where it names criteria."""
    text = flag.help
    if flag.name.split(".")[-1] in CRITERIA:
        text = f"{text} Registered: {', '.join(list_usages())}."
    return text if flag.is_required else f"{text} (default: {format_value(flag.default)})"


def format_value(value: Any) -> str:
    """Return a default as help texts show it: a list as the words that are typed, text with line breaks as Python's."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return repr(value) if isinstance(value, str) and value.strip() != value else str(value)


def _format_entry(words: str, text: str, width: int) -> Iterator[str]:
    """Yield the lines of one flag: words on the left, help text on the right."""
    lines = textwrap.wrap(text, width - COLUMN, break_long_words=False, break_on_hyphens=False) or [""]
    left = f"  {words}"
    if len(left) > COLUMN - 2:
        # of a long list of choices, the commas may end a line
        yield from (
            [left]
            if len(left) <= width
            else textwrap.wrap(
                words.replace(",", ", "), width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
            )
        )
        left = ""
    for line in lines:
        yield f"{left:<{COLUMN}}{line}".rstrip()
        left = ""
