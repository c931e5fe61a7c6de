"""The native core is compiled once for the environment of the tests and for the wheel (scripts/compile_once.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.source

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "compile_once.py"
COMPILER = shutil.which("g++") or shutil.which("c++")
if COMPILER is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

FILES = {"unit.cpp": '#include "part.hpp"\nint answer() { return PART + WORD; }\n', "part.hpp": "#define PART 40\n"}


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """Return a compiler that notes its commands in a file beside it."""
    path = tmp_path / "compiler"
    path.write_text(f'#!/bin/sh\necho "$@" >> {path}.log\nexec {COMPILER} "$@"\n')
    path.chmod(0o755)
    return path


def compile_in(folder: Path, compiler: Path, *options: str, **files: str) -> tuple[bytes, bool]:
    """Compile FILES, with other contents by name, in a folder; return the object and whether the compiler made it."""
    folder.mkdir()
    for name, content in (FILES | {name.replace("_", "."): text for name, text in files.items()}).items():
        (folder / name).write_text(content)
    log = Path(f"{compiler}.log")
    log.unlink(missing_ok=True)
    command = [compiler, "-DWORD=2", "-O1", "-I", folder, *options, "-MD", "-MT", "unit.o", "-MF", "unit.d", "-o",
               "unit.o", "-c", folder / "unit.cpp"]  # fmt: skip
    environment = {**os.environ, "GENSSD_OBJECTS": str(compiler.parent / "objects")}
    subprocess.run([sys.executable, SCRIPT, *command], cwd=folder, env=environment, check=True)
    assert str(folder / "part.hpp") in (folder / "unit.d").read_text(), "ninja would miss a change of the header"
    compiled = any(" -E" not in line and " -c " in line for line in log.read_text().splitlines())
    return (folder / "unit.o").read_bytes(), compiled


def test_another_folder_gets_the_object_and_whatever_matters_another_one(tmp_path: Path, compiler: Path) -> None:
    first, compiled = compile_in(tmp_path / "a", compiler)
    assert compiled
    assert compile_in(tmp_path / "b", compiler) == (first, False)
    for number, (options, files) in enumerate(
        [((), {"part_hpp": "#define PART 41\n"}), (("-DWORD=3",), {}), (("-O2",), {}), (("-g",), {})]
    ):
        changed, compiled = compile_in(tmp_path / f"c{number}", compiler, *options, **files)
        assert compiled, (options, files)
        assert options == ("-O2",) or changed != first
    assert compile_in(tmp_path / "d", compiler) == (first, False)
    compiler.write_text(compiler.read_text().replace('"$@"\n', '-DMORE "$@"\n'))  # a script's own options, too
    assert compile_in(tmp_path / "e", compiler)[1]


def test_an_error_of_the_compiler_is_an_error_and_leaves_nothing(tmp_path: Path, compiler: Path) -> None:
    for name, content in (("a", "int f() { return missing; }\n"), ("b", '#include "absent.hpp"\n')):
        with pytest.raises(subprocess.CalledProcessError):
            compile_in(tmp_path / name, compiler, unit_cpp=content)
    assert not list(tmp_path.glob("objects/*"))
