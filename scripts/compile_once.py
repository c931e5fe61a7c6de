#!/usr/bin/env python3
"""Compile one file of C++, or copy the object of an equal compilation: `compile_once.py COMPILER ARGUMENT...`.

`make` has CMake start this before the compiler, so that the wheel, which is built from the sources in another folder,
and the environment of the tests compile the native core once. Compilations are equal if the preprocessed text, the
options but for folders, and the compiler's version are; objects are kept in the folder GENSSD_OBJECTS. A command that
compiles no single file to an object, or with debug symbols, which hold folders, goes to the compiler as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PLACES = ("-I", "-isystem", "-include", "-MF", "-MT", "-MQ", "-o", "-c")
"""Options whose value, in the next argument, is a file or a folder: what matters of it is in the preprocessed text."""
SCRIPT = 1 << 16
"""Maximum size in bytes of a compiler that is taken for a script."""


def main() -> int:
    """Run the command of the arguments; return its exit code."""
    command, objects = sys.argv[1:], os.environ.get("GENSSD_OBJECTS")
    if not objects or not {"-c", "-o"} <= set(command) or any(option.startswith("-g") for option in command):
        return subprocess.run(command).returncode
    target = Path(command[command.index("-o") + 1])
    preprocess = [option for option in command if option != "-c"]
    del preprocess[preprocess.index("-o") : preprocess.index("-o") + 2]
    # writes the list of included files as well, where the command asks for one
    text = subprocess.run([*preprocess, "-E", "-P"], stdout=subprocess.PIPE)
    if text.returncode != 0:
        return text.returncode
    kept = Path(objects) / name_compilation(command, text.stdout)
    if not kept.exists():
        code = subprocess.run(command).returncode
        if code == 0:
            keep(target, kept)
        return code
    shutil.copyfile(kept, target)
    return 0


def name_compilation(command: list[str], text: bytes) -> str:
    """Return a name for what the object depends on: the text, the options and the compiler."""
    options = [
        option
        for before, option in zip(["", *command], command, strict=False)
        if before not in PLACES and not option.startswith(("-I", "-isystem"))
    ]
    version = subprocess.run([command[0], "--version"], stdout=subprocess.PIPE).stdout
    compiler = Path(shutil.which(command[0]) or command[0])
    if compiler.stat().st_size <= SCRIPT:
        version += compiler.read_bytes()  # a script may give options of its own
    return hashlib.sha256(b"\0".join([version, *map(os.fsencode, options), text])).hexdigest()


def keep(target: Path, kept: Path) -> None:
    """Copy an object; another process sees the whole copy or none."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
        file.write(target.read_bytes())
    os.replace(file.name, kept)


if __name__ == "__main__":
    sys.exit(main())
