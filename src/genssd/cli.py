"""The command line: `genssd COMMAND [--config FILE.yaml] [--flag value ...]`.

A command is a config dataclass and the function that runs it. The keys of a YAML file become flags before the typed
ones, so both are checked in the same way and a typed flag wins (flags.py). Bad input, and output that cannot be
written, end with one line on stderr and exit code 2; a signal ends with 128 plus its number (stopping.py).

This file imports little, so that a signal during the imports of the commands is met by our own handlers.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from genssd.early_checks import check_examined, check_names, check_output, check_runs
from genssd.engine.common.closest import suggest_or_list
from genssd.engine.common.errors import GenssdError, InputError
from genssd.refused_memory import describe_refused_memory, means_refused_memory
from genssd.stopping import StopSignals, is_main_process
from genssd.streams import discard, open_standard_streams, print_error

SUMMARIES = {
    "demo": "the whole job on the small pair that ships with genssd: select, train, evaluate, compare",
    "select": "let the student choose what the teacher writes: problems in, selected trajectories out",
    "score": "criteria over finished traces: columns, the best response per prompt, a ranking of teachers",
    "export": "the rows of a search, with the teacher's most likely tokens, as another trainer reads them",
    "reselect": "another criterion over the decisions of a finished search; preference pairs, stepwise rows",
    "generate": "responses of the teacher, with the student's say token by token (RSD), or of both in turns",
    "prefix": "the shortest prefix of a trace that the student can continue by itself (P-ALIGN)",
    "leaf": "training rows without the words that distract the student (LeaF)",
    "train": "fine-tune the student on selected trajectories",
    "distill": "rounds of select and train: the trained student chooses in the next round",
    "evaluate": "measure a model's accuracy on problems with known answers",
    "diagnose": "where which teacher, loss or context would help the student, before anything is trained",
    "report": "one page of runs: search trees, text coloured by surprisal, other criteria, curves, accuracy",
    "reproduce": "does selection help? many ways to select and train, with controls, seeds and intervals",
    "tune": "measure the fastest kernel configurations on this GPU for some models, once",
    "doctor": "examine models, data, settings and machine of a command before anything is loaded",
    "env": "versions, machine and kernels as plain text, for bug reports",
}

USAGE = "\n".join(
    [
        "usage: genssd COMMAND [--config FILE.yaml] [--flag value ...]",
        "",
        *(f"  {name:<10}{summary}" for name, summary in SUMMARIES.items()),
        "",
        "`genssd COMMAND --help` lists the flags of a command, `genssd COMMAND --print-config` writes them as a file.",
        "`genssd --print-completion bash|zsh|fish` prints a script that completes commands and flags.",
    ]
)

PRINT_CONFIG = "--print-config"
"""Flag of every command that prints its settings as a config file."""
OPENMP_SETTINGS = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
"""Settings of GNU's and of Intel's OpenMP library with which threads that wait for work sleep."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exits with 0, with 2 on bad input, with 128 plus its number after a signal.

    arguments: the words after `genssd`. None: those of this process, whose signals are then handled until it ends.
    """
    with StopSignals(restore=arguments is not None) as signals:
        open_standard_streams()
        code = _run_guarded(list(sys.argv[1:] if arguments is None else arguments), signals)
    if code:
        sys.exit(code)


def _run_guarded(words: Sequence[str], signals: StopSignals) -> int:
    """Run a command, print what ended it, and return the exit code."""
    try:
        try:
            code = _run(words, signals)
        except SystemExit as stop:  # of --help
            code = stop.code if isinstance(stop.code, int) else 0
        sys.stdout.flush()
        return code
    except GenssdError as error:
        message, code = str(error), 2
    except KeyboardInterrupt as error:
        message, code = signals.describe(error), signals.exit_code
    except BrokenPipeError:
        message, code = "the reader of the output has gone", 1
    except (MemoryError, RuntimeError, ImportError, OSError) as error:
        if means_refused_memory(error):
            message, code = describe_refused_memory(error), 2
        elif isinstance(error, OSError):
            place = "the output" if error.filename is None else error.filename
            message, code = f"{place} cannot be read or written: {error.strerror or error}", 2
        else:
            raise
    if is_main_process() or code == 2:
        print_error(message)
    try:
        sys.stdout.flush()
    except OSError:
        discard(sys.stdout)
    return code


def _run(words: Sequence[str], signals: StopSignals) -> int:
    """Read the config of a command from its flags, run the command, and return the exit code."""
    _let_idle_threads_sleep()  # before anything imports torch
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    command, *flags = words
    if command == "--version":
        print(f"genssd {import_module('importlib.metadata').version('genssd')}")
        return 0
    if command == "--print-completion":
        print(import_module("genssd.completion").render_completion(flags[0] if flags else "", SUMMARIES), end="")
        return 0
    if command not in SUMMARIES:
        raise InputError(f"unknown command {command!r}{suggest_or_list(command, SUMMARIES)}")
    examined: list[str] = []
    if command == "doctor":
        flags, examined = _split_examined(flags)
    if {"-h", "--help"} & {*flags, *examined}:
        asked = examined[0] if examined else command
        print(import_module("genssd.help_text").render_help(asked, import_module("genssd.configs").CONFIGS[asked]))
        return 0
    if PRINT_CONFIG in flags:
        print(_render_config(command, [flag for flag in flags if flag != PRINT_CONFIG]), end="")
        return 0
    if command == "doctor":
        check_examined(flags)
    check_names(flags)
    check_names(examined[1:])
    _quiet_libraries()
    _show_log()
    config_class = import_module("genssd.configs").CONFIGS[command]
    config = import_module("genssd.flags").read_config(command, flags, config_class)
    import_module("genssd.distill.runs.effects").check_effects(config)
    check_runs(config)
    if is_main_process():  # of several processes of a training it alone claims the directory
        check_output(command, config)
    commands = import_module("genssd.commands")  # from here on torch is there
    console = import_module("rich.console").Console(stderr=True)
    signals.begin_work(getattr(config, "output_dir", None))
    return int(commands.run_command(command, config, console, examined))


def _render_config(command: str, flags: Sequence[str]) -> str:
    """Return the settings that flags stand for as a config file."""
    config_class = import_module("genssd.configs").CONFIGS[command]
    config, missing = import_module("genssd.flags").read_incomplete(command, flags, config_class)
    text: str = import_module("genssd.config_text").render_config(command, config, missing)
    return text


def _split_examined(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the doctor's own flags, and the command with its flags that stand after them, if there is one."""
    start = next((i for i, word in enumerate(words) if word in SUMMARIES and words[i - 1] != "--command"), len(words))
    return words[:start], words[start:]


class _StderrHandler(logging.Handler):
    """A handler that prints every record as one line on the stderr of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print_error(record.getMessage())


def _show_log() -> None:
    """Print what genssd logs: what an engine takes on this GPU or CPU, and unusable tune files."""
    log = logging.getLogger("genssd")
    if not log.handlers:
        log.addHandler(_StderrHandler())
        log.setLevel(logging.INFO)


def _let_idle_threads_sleep() -> None:
    """Set the environment so that OpenMP threads without work leave their core, unless the user has decided otherwise.

    By default they wait in a loop, which on a busy machine takes the time of the threads that work. Has no effect once
    torch is imported.
    """
    if not {*OPENMP_SETTINGS, "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(OPENMP_SETTINGS)


def _quiet_libraries() -> None:
    """Silence the progress bars and warnings of transformers and datasets, before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.captureWarnings(True)
