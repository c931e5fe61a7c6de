"""Flags are read, and refused, before torch is imported: its import takes seconds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.flags import FLAGS

from genssd.configs import CONFIGS

HEAVY = ("torch", "transformers", "triton", "tokenizers", "safetensors", "matplotlib", "ray", "genssd._core")
"""Packages whose import takes long, and the native core, which needs torch."""

SAY_IMPORTED = f"""
import sys
def say_imported():
    print("imported:", *(name for name in {HEAVY!r} if name in sys.modules))
"""
READ = """
import json
from genssd.configs import CONFIGS
from genssd.distill.runs.effects import check_effects
from genssd.flags import read_config
for command, flags in json.loads(sys.argv[1]).items():
    check_effects(read_config(command, flags, CONFIGS[command]))
    say_imported()
"""
MAIN = """
import json
from genssd.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as stop:
        print("exit code", stop.code)
    say_imported()
"""


def run_light(program: str, argument: object, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python of its own."""
    return subprocess.run(
        [sys.executable, "-c", SAY_IMPORTED + program, json.dumps(argument)],
        cwd=directory, capture_output=True, text=True, check=True,
    )  # fmt: skip


def test_the_flags_of_every_command_are_read_without_torch(tmp_path: Path) -> None:
    assert FLAGS.keys() == CONFIGS.keys()
    done = run_light(READ, FLAGS, tmp_path)
    assert done.stdout.splitlines() == ["imported:"] * len(CONFIGS)


REFUSED = {
    "select --teacher . --student . --data d --bogus 3": "unknown flag --bogus; `genssd select --help` lists the flags",
    "select --teacher . --student . --data d --candidate 3": "unknown flag --candidate; did you mean '--candidates'",
    "select --teacher . --student . --data d --candidates 0": "candidates must be at least 1, not 0",
    "select --teacher . --student . --data d --criterion pl": "unknown criterion 'pl'.*; did you mean 'ppl'",
    "select --teacher . --student . --data d --criterion lalp(k=2)": "lalp has no option k; it has: steps, share",
    "select --teacher . --student . --data d --max-resamples 3": "max_resamples=3 has no effect",
    "select --teacher nowhere --student . --data d": "model directory nowhere does not exist|nowhere",
    "select --teacher . --student . --data d --ray-actors 2": "ray_actors='2' has no effect: it needs ray",
    "select --teacher . --student . --data s3://b/x": "s3://b/x is a URL.*, it is read with --ray local",
    "train --model-name-or-path . --data d --kd-loss forward_lk": "invalid choice .*; did you mean 'forward_kl'",
    "train --model-name-or-path . --data d --kd-loss jsd": "kd_loss='jsd' has no effect",
    "train --model-name-or-path . --data d --learning-rate much": "much",
    "score --student . --data d --criteria rsr(rmax=3)": "did you mean 'r_max'",
    "report nowhere": "nowhere",
    "reselect --run nowhere": "nowhere",
    "export --run nowhere --format distilkit": "did you mean 'distillkit'",
    "evaluate --data d": "--model",
    "selct --data d": "unknown command 'selct'; did you mean 'select'",
}
"""Commands that are refused, and what the message says."""


def test_what_is_refused_is_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("{}\n")
    done = run_light(MAIN, [line.split() for line in REFUSED], tmp_path)
    assert done.stdout.splitlines() == ["exit code 2", "imported:"] * len(REFUSED), done.stderr
    for line, message in zip(done.stderr.splitlines(), REFUSED.values(), strict=True):
        assert line.startswith("genssd: ")
        assert re.search(message, line), line


@pytest.mark.parametrize("command", ["select", "report"])
def test_help_is_printed_without_torch(command: str, tmp_path: Path) -> None:
    done = run_light(MAIN, [[command, "--help"]], tmp_path)
    assert done.stdout.splitlines()[-1] == "imported:"
