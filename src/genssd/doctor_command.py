"""The commands `genssd doctor` and `genssd env`, and the doctor's line before other commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from genssd.distill.doctor.config import DoctorConfig, EnvConfig
from genssd.distill.doctor.console import show_findings, write_json
from genssd.distill.doctor.env import describe_environment
from genssd.distill.doctor.examine import examine, summarise
from genssd.distill.doctor.findings import LEVELS, find_worst
from genssd.distill.doctor.settings import Settings, read_settings
from genssd.distill.files.cluster_files import is_for_cluster
from genssd.distill.runs.effects import check_effects
from genssd.distill.runs.pool_options import PoolOptions
from genssd.engine.common.errors import GenssdError, InputError
from genssd.engine.common.quoting import one_line
from genssd.examined import read_examined
from genssd.printing import warn

PLAIN_WIDTH = 100
"""Columns of what the doctor prints where its output is no terminal."""


def doctor(config: DoctorConfig, console: Console, words: Sequence[str] = ()) -> int:
    """Examine and print; return the exit code. words: a command and its flags, which were typed after the doctor's."""
    check_effects(config)
    settings = read_examined(config, words)
    for name in _list_cluster_data(settings):
        raise InputError(
            f"{name} is read through Ray, which the doctor does not start; examine a file with some of its rows: --data"
        )
    findings = examine(settings, rows=config.rows, verify_seconds=config.verify_seconds if config.verify else None)
    if config.json:
        print(write_json(findings, settings.command))
    else:
        screen = Console()
        show_findings(findings, screen if screen.is_terminal else Console(width=PLAIN_WIDTH))
    return LEVELS.index(find_worst(findings))


def env(config: EnvConfig, console: Console) -> None:
    print(describe_environment())


def examine_first(command: str, config: Any, console: Console) -> None:
    """Print one line of the doctor on the inputs of a command. What the command refuses at once is left to it.

    A fault of the doctor's own is such a line as well: it must not keep a command from running.
    """
    try:
        settings = read_settings(command, config)
        line = None if _list_cluster_data(settings) else summarise(settings)
    except GenssdError:
        return
    except Exception as error:
        line = f"the doctor failed and is left out, please report it: {type(error).__name__}: {one_line(error)}"
    if line is not None:
        warn(line, console)


def _list_cluster_data(settings: Settings) -> list[str]:
    """Return the data that a command reads through a cluster, which is not there for the doctor."""
    has_cluster = isinstance(settings.engine, PoolOptions) and settings.engine.ray is not None
    return [name for name in settings.data if has_cluster and is_for_cluster(name)]
