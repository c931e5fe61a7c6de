"""Compare wheels with the tree that they are built from: `python scripts/check_wheel.py [--closed] WHEEL...`.

A wheel must hold every file of the package byte for byte, one native core of its tags and architecture, the metadata
of pyproject.toml, and nothing else: no test, no benchmark, no source of the core. What differs is named, a line each,
and the exit code is 1.

--closed: the core must also show no symbol but its entry point, and need no C++ library: the wheels of a release bring
their own, which must not meet that of torch. And they must run with glibc 2.17, by their tags.

Needed besides the standard library: packaging, and pyelftools for --closed.
"""

from __future__ import annotations

import argparse
import base64
import configparser
import hashlib
import io
import os
import struct
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "src/genssd"
MACHINES = {"x86_64": 62, "aarch64": 183}
"""Numbers of the architectures in the header of an ELF file."""
SYSTEM_LIBRARIES = ("libc.so", "libm.so", "libpthread.so", "libdl.so", "librt.so", "ld-linux")
"""Beginnings of the names of the shared libraries that a closed core may need: those of glibc."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """The contents of a wheel."""

    name: str
    """Its file name."""
    files: Mapping[str, bytes]
    """Contents by path."""

    @classmethod
    def read(cls, path: Path) -> Wheel:
        """Read the wheel at a path."""
        with zipfile.ZipFile(path) as archive:
            return cls(path.name, {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"})

    @property
    def info(self) -> str:
        """Path of the folder of the metadata, with a slash at its end."""
        name, version, *_ = self.name.split("-")
        return f"{name}-{version}.dist-info/"

    def parse(self, name: str) -> Message:
        """Return a file of the metadata, by its headers; without any where the file is missing."""
        return message_from_bytes(self.files.get(self.info + name, b""))


def read_package(root: Path) -> dict[str, bytes]:
    """Return the files of the package in a tree by their paths in a wheel; what Python and compilers leave is not."""
    found: dict[str, bytes] = {}
    package = root / PACKAGE
    for folder, names, files in os.walk(package, followlinks=True):
        names[:] = [name for name in names if name != "__pycache__"]
        for path in (Path(folder, name) for name in files):
            if path.suffix not in (".so", ".pyc"):
                found[f"genssd/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    return found


def iter_faults(wheel: Wheel, root: Path, *, is_closed: bool = False) -> Iterator[str]:
    """Yield what in a wheel is not as the tree at `root` says, a line each."""
    package, project = read_package(root), tomllib.loads((root / "pyproject.toml").read_text())["project"]
    cores = {name for name in wheel.files if name.startswith("genssd/_core.") and name.endswith(".so")}
    held = {name for name in wheel.files if not name.startswith(wheel.info)} - cores
    yield from (f"{name} is missing" for name in sorted(package.keys() - held))
    yield from (f"{name} does not belong into the package" for name in sorted(held - package.keys()))
    changed = sorted(name for name in package.keys() & held if package[name] != wheel.files[name])
    yield from (f"{name} differs from that of the tree" for name in changed)
    yield from iter_core_faults(wheel, cores, is_closed=is_closed)
    yield from iter_metadata_faults(wheel, project, root)
    yield from iter_record_faults(wheel)


def iter_core_faults(wheel: Wheel, cores: set[str], *, is_closed: bool) -> Iterator[str]:
    """Yield what is wrong with the native core: its name and its architecture are those of the wheel's tags."""
    _, _, _, tags = parse_wheel_filename(wheel.name)
    for tag in sorted(tags, key=str):
        architecture = next((one for one in MACHINES if tag.platform.endswith(one)), None)
        if architecture is None:
            yield f"the platform {tag.platform} has no native core"
            continue
        ending = "abi3" if tag.abi == "abi3" else f"cpython-{tag.abi.removeprefix('cp')}-{architecture}-linux-gnu"
        wanted = f"genssd/_core.{ending}.so"
        if cores != {wanted}:
            yield f"the tag {tag} asks for {wanted}, not for {sorted(cores) or 'no core'}"
        for name in cores:
            machine = struct.unpack_from("<H", wheel.files[name], 18) if len(wheel.files[name]) > 20 else (0,)
            if machine != (MACHINES[architecture],):
                yield f"{name} is not for {architecture}"
    if is_closed:
        if not any(tag.platform.startswith("manylinux_2_17_") for tag in tags):
            yield "no tag is that of glibc 2.17"
        for name in cores:
            yield from (f"{name} {fault}" for fault in iter_link_faults(wheel.files[name]))


def iter_link_faults(core: bytes) -> Iterator[str]:
    """Yield the symbols that a core shows beside its entry point, and the libraries that are not glibc's."""
    from elftools.elf.elffile import ELFFile

    elf: Any = ELFFile(io.BytesIO(core))
    for symbol in elf.get_section_by_name(".dynsym").iter_symbols():
        if symbol.name and symbol["st_shndx"] != "SHN_UNDEF" and symbol.name != "PyInit__core":
            yield f"shows the symbol {symbol.name}"
    for entry in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED"):
        if not entry.needed.startswith(SYSTEM_LIBRARIES):
            yield f"needs {entry.needed}"


def list_requirements(project: Mapping[str, Any]) -> set[str]:
    """Return what a project requires, that of its extras with their markers."""
    texts = {str(Requirement(text)) for text in project["dependencies"]}
    for extra, requirements in project["optional-dependencies"].items():
        for one in map(Requirement, requirements):
            condition = f'extra == "{extra}"'
            one.marker = Marker(condition if one.marker is None else f"({one.marker}) and {condition}")
            texts.add(str(one))
    return texts


def iter_metadata_faults(wheel: Wheel, project: Mapping[str, Any], root: Path) -> Iterator[str]:
    """Yield what in the metadata is not that of pyproject.toml."""
    metadata, about, version = wheel.parse("METADATA"), wheel.parse("WHEEL"), project["version"]
    _, named, _, tags = parse_wheel_filename(wheel.name)
    if str(named) != version:
        yield f"the file is named for version {named}, pyproject.toml has {version}"
    expected = {
        "Name": {project["name"]},
        "Version": {version},
        "Requires-Python": {project["requires-python"]},
        "License-Expression": {project["license"]},
        "Provides-Extra": set(project["optional-dependencies"]),
    }
    values: dict[str, set[str]] = {key: set(map(str, metadata.get_all(key, []))) for key in expected}
    for key in expected:
        if values[key] != expected[key]:
            yield f"METADATA has {key} {sorted(values[key])}, pyproject.toml {sorted(expected[key])}"
    required = {str(Requirement(text)) for text in map(str, metadata.get_all("Requires-Dist", []))}
    yield from (f"METADATA lacks the requirement {text}" for text in sorted(list_requirements(project) - required))
    yield from (f"METADATA has the requirement {text}" for text in sorted(required - list_requirements(project)))
    if set(map(str, about.get_all("Tag", []))) != set(map(str, tags)):
        yield f"WHEEL has the tags {about.get_all('Tag')}, the file name {sorted(map(str, tags))}"
    if about["Root-Is-Purelib"] != "false":
        yield "WHEEL calls it pure Python"
    entries = configparser.ConfigParser(delimiters=("=",))
    entries.read_string(wheel.files.get(f"{wheel.info}entry_points.txt", b"").decode())
    scripts = dict(entries["console_scripts"]) if entries.has_section("console_scripts") else {}
    if scripts != project["scripts"]:
        yield f"entry_points.txt has {scripts}, pyproject.toml {project['scripts']}"
    for name in project["license-files"]:
        if wheel.files.get(f"{wheel.info}licenses/{name}") != (root / name).read_bytes():
            yield f"{name} is not in the wheel as it is in the tree"


def iter_record_faults(wheel: Wheel) -> Iterator[str]:
    """Yield the files whose line in RECORD, by which pip installs and removes, is missing or wrong."""
    record = f"{wheel.info}RECORD"
    rows = (line.rsplit(",", 2) for line in wheel.files.get(record, b"").decode().splitlines())
    sums = {name.strip('"'): digest for name, digest, _ in rows}
    for name, content in sorted(wheel.files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        if name != record and sums.get(name) != f"sha256={digest}":
            yield f"RECORD has no line, or a wrong one, for {name}"
    yield from (f"RECORD names {name}, which is missing" for name in sorted(sums.keys() - wheel.files.keys()))


def main() -> None:
    """Check the wheels that are named."""
    parser = argparse.ArgumentParser(description="Compare wheels with the tree that they are built from.")
    parser.add_argument("--closed", action="store_true", help="their cores show and need nothing of C++")
    parser.add_argument("wheel", type=Path, nargs="+")
    arguments = parser.parse_args()
    failed = False
    for path in arguments.wheel:
        wheel = Wheel.read(path)
        faults = list(iter_faults(wheel, ROOT, is_closed=arguments.closed))
        failed = failed or bool(faults)
        size = f"{path.stat().st_size / 1e6:.1f} MB, {len(wheel.files)} files"
        print("\n  ".join([f"{path.name} ({size}): {'as the tree' if not faults else 'not as the tree'}", *faults]))
    sys.exit(failed)


if __name__ == "__main__":
    main()
