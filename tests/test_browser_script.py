"""`scripts/install_browser.sh` never fails: it names the browser, or says why there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/install_browser.sh"
NEEDED = ("bash", "sh", "mktemp", "rm", "timeout", "grep", "tail")

pytestmark = pytest.mark.source


def run(folder: Path, programs: dict[str, str], **environment: str) -> str:
    """What the script prints where PATH has these programs alone, and what it needs itself."""
    folder.mkdir()
    for name in NEEDED:
        path = shutil.which(name)
        assert path is not None
        (folder / name).symlink_to(path)
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    command = [str(folder / "bash"), str(SCRIPT)]
    variables = {"PATH": str(folder), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
    return done.stdout + done.stderr


def test_it_names_the_browser_or_says_why_there_is_none(tmp_path: Path) -> None:
    root, user = {"id": "echo 0"}, {"id": "echo 1000"}
    fails = {"apt-get": "echo 'E: no such package' >&2; exit 100"}
    skipped = "browser tests will be skipped: "
    assert run(tmp_path / "there", {"chromium": ""}) == f"browser tests run in {tmp_path}/there/chromium\n"
    assert run(tmp_path / "a", root) == f"{skipped}no Chromium, and no apt-get to install it with\n"
    only_root = "no Chromium, and only root can install it: sudo apt-get install chromium\n"
    assert run(tmp_path / "b", {**user, **fails}) == skipped + only_root
    assert run(tmp_path / "c", {**root, **fails}).endswith("within 4 minutes: E: no such package\n")
    refused = run(tmp_path / "d", {**root, **fails}, GENSSD_NO_BROWSER="1")
    assert refused == f"{skipped}no Chromium, and GENSSD_NO_BROWSER is set\n"
    snap = run(tmp_path / "e", {**root, "apt-get": "exit 0"})
    assert snap == f"{skipped}apt-get's package chromium brings no browser of that name\n"


def test_it_installs_with_apt_get(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    calls = tmp_path / "calls"
    chmod = shutil.which("chmod")
    install = (
        f'echo "$@" >> {calls}; case "$*" in *install*) echo > {folder}/chromium; {chmod} +x {folder}/chromium;; esac'
    )
    text = run(folder, {"id": "echo 0", "apt-get": install})
    assert text == f"browser tests run in {folder}/chromium, which was installed\n"
    assert [line.split()[1] for line in calls.read_text().splitlines()] == ["update", "install"]
    assert os.access(folder / "chromium", os.X_OK)
