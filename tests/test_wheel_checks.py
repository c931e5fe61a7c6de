"""The checks of `make wheel` (scripts/check_wheel.py, check_installed.py): what is wrong with a wheel is found.

The wheel is the real one but for the native core, which takes minutes to build: a header of an ELF file stands for it.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.check_installed import iter_import_faults, iter_modules
from scripts.check_wheel import PACKAGE, Wheel, iter_faults, iter_link_faults, read_package

import genssd
from genssd import _core

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.source

BUILD = """
import sys
from scikit_build_core.build import build_wheel
build_wheel(sys.argv[1], {"wheel.cmake": "false", "wheel.py-api": ""})
"""
CORE = "genssd/_core.cpython-311-aarch64-linux-gnu.so"


def make_elf(machine: int) -> bytes:
    """Return the first bytes of an ELF file for a machine."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 3, machine, 1)


def change(wheel: Wheel, changes: dict[str, bytes | None], *, recorded: bool = True) -> Wheel:
    """Return a wheel with other contents of files, None for no such file; recorded: RECORD is made to fit."""
    files = {name: content for name, content in {**wheel.files, **changes}.items() if content is not None}
    if recorded:
        rows = (
            f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip('=')},"
            f"{len(content)}\n"
            for name, content in files.items()
        )
        files[f"{wheel.info}RECORD"] = "".join(rows).encode()
    return Wheel(wheel.name, files)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    made = Wheel.read(path)
    tag = "cp311-cp311-manylinux_2_17_aarch64"
    about = re.sub(rb"Tag: .*", f"Tag: {tag}".encode(), made.files[f"{made.info}WHEEL"])
    about = about.replace(b"Purelib: true", b"Purelib: false")
    name = f"{'-'.join(made.name.split('-')[:2])}-{tag}.whl"
    return change(dataclasses.replace(made, name=name), {CORE: make_elf(183), f"{made.info}WHEEL": about})


def test_the_wheel_of_this_tree_has_no_faults(wheel: Wheel) -> None:
    assert list(iter_faults(wheel, ROOT)) == []
    package = read_package(ROOT)
    assert {"genssd/py.typed", "genssd/_core.pyi", "genssd/kernels/linear.py", "genssd/engine/engine.py"} <= set(
        package
    )
    assert {"genssd/distill/small_pair/student/model.safetensors", "genssd/distill/report/page/90_main.js"} <= set(
        package
    )
    assert not [
        name for name in wheel.files if re.search(r"(^|/)(tests?|bench|csrc)/|__pycache__|\.(hpp|cpp|o|pyc)$", name)
    ]


def test_what_git_holds_of_the_package_is_what_a_wheel_must_hold() -> None:
    """No file of the tree is forgotten by the check itself. A file that git ignores is none of the package."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    places = {name: name.removeprefix(f"{PACKAGE}/") for name in listed if (ROOT / name).is_file()}
    layers = tuple(f"{path.name}/" for path in (ROOT / PACKAGE).iterdir() if path.is_symlink())
    assert len(layers) == 3
    held = {f"genssd/{place}" for name, place in places.items() if name.startswith((f"{PACKAGE}/", *layers))}
    assert set(read_package(ROOT)) == held


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("genssd/engine/engine.py", None, "genssd/engine/engine.py is missing"),
        ("genssd/distill/small_pair/teacher/model.safetensors", None, "teacher/model.safetensors is missing"),
        ("genssd/distill/report/page/body.html", None, "report/page/body.html is missing"),
        ("genssd/distill/pages/frame.css", b"", "frame.css differs from that of the tree"),
        ("genssd/py.typed", None, "genssd/py.typed is missing"),
        ("genssd/csrc/core.cpp", b"", "genssd/csrc/core.cpp does not belong into the package"),
        ("tests/test_package.py", b"", "tests/test_package.py does not belong into the package"),
        (CORE, None, "asks for genssd/_core.cpython-311-aarch64-linux-gnu.so, not for no core"),
        (CORE, make_elf(62), "is not for aarch64"),
        (CORE, b"", "is not for aarch64"),
        ("genssd/_core.abi3.so", make_elf(183), "asks for genssd/_core.cpython-311-aarch64-linux-gnu.so, not for ["),
        ("*entry_points.txt", None, "entry_points.txt has {}"),
        ("*entry_points.txt", b"[console_scripts]\ngenssd = genssd.cli:run\n", "entry_points.txt has {'genssd'"),
        ("*licenses/LICENSE", None, "LICENSE is not in the wheel"),
        ("*WHEEL", b"Root-Is-Purelib: false\nTag: cp312-abi3-linux_x86_64\n", "WHEEL has the tags"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_as_it_should_be_is_named(
    name: str, content: bytes | None, fault: str, wheel: Wheel
) -> None:
    (found,) = iter_faults(change(wheel, {name.replace("*", wheel.info): content}), ROOT)
    assert fault in found


@pytest.mark.parametrize(
    ("old", "new", "faults"),
    [
        ("\nVersion: ", "\nVersion: 9", ["METADATA has Version"]),
        ("Requires-Python: >=3.11", "Requires-Python: >=3.9", ["METADATA has Requires-Python"]),
        ("Requires-Dist: tyro>=0.9\n", "", ["METADATA lacks the requirement tyro>=0.9"]),
        ("Requires-Dist: rich", "Requires-Dist: ruff\nRequires-Dist: rich", ["METADATA has the requirement ruff"]),
        ("Provides-Extra: ray\n", "", ["METADATA has Provides-Extra"]),
        ('>=2.50; extra == "ray"', '>=2.50; extra == "data"', ['lacks the requirement ray[data]>=2.50; extra == "ray"',
                                                              'has the requirement ray[data]>=2.50; extra == "data"']),
    ],
)  # fmt: skip
def test_metadata_that_are_not_those_of_the_project_are_named(
    old: str, new: str, faults: list[str], wheel: Wheel
) -> None:
    text = wheel.files[f"{wheel.info}METADATA"].decode().replace("'", '"')
    assert old in text
    found = list(iter_faults(change(wheel, {f"{wheel.info}METADATA": text.replace(old, new, 1).encode()}), ROOT))
    assert len(found) == len(faults)
    assert all(fault in line for fault, line in zip(faults, found, strict=True))


def test_a_wheel_of_another_version_is_named(wheel: Wheel) -> None:
    _, version, *rest = wheel.name.split("-")
    other = Wheel("-".join(["genssd", f"{version}.1", *rest]), wheel.files)
    assert f"the file is named for version {version}.1, pyproject.toml has {version}" in list(iter_faults(other, ROOT))


def test_a_record_that_pip_would_not_follow_is_named(wheel: Wheel) -> None:
    record = f"{wheel.info}RECORD"
    lines = wheel.files[record].decode().splitlines(keepends=True)
    dropped = next(line for line in lines if line.startswith("genssd/cli.py,"))
    damaged = "".join(line for line in lines if line is not dropped) + "genssd/gone.py,sha256=x,1\n"
    assert list(iter_faults(change(wheel, {record: damaged.encode()}, recorded=False), ROOT)) == [
        "RECORD has no line, or a wrong one, for genssd/cli.py",
        "RECORD names genssd/gone.py, which is missing",
    ]


def test_symbols_and_libraries_of_a_core_are_named() -> None:
    """The core of this environment is linked to the C++ library of its compiler, as those of a release must not be."""
    pytest.importorskip("elftools")
    core = Path(str(_core.__file__)).read_bytes()
    assert any(line.startswith("needs libstdc++") for line in iter_link_faults(core))


def test_a_wheel_for_a_younger_glibc_is_named(wheel: Wheel) -> None:
    pytest.importorskip("elftools")
    core = Path(str(_core.__file__)).read_bytes()
    younger = dataclasses.replace(change(wheel, {CORE: core}), name=wheel.name.replace("2_17", "2_35"))
    assert "no tag is that of glibc 2.17" in list(iter_faults(younger, ROOT, is_closed=True))
    assert "no tag is that of glibc 2.17" not in list(iter_faults(change(wheel, {CORE: core}), ROOT, is_closed=True))


def test_every_module_of_the_package_is_imported() -> None:
    package = Path(str(genssd.__file__)).parent
    names = set(iter_modules(package))
    assert {"genssd", "genssd.cli", "genssd.__main__", "genssd.engine.engine", "genssd.distill.report.run"} <= names
    assert len(names) == sum(name.endswith(".py") for name in read_package(ROOT))


def test_modules_that_need_what_a_user_does_not_have_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_wheel"
    (package / "inner").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "good.py": "import json",
        "inner/linter.py": "import a_linter.tools",  # what only developers have
        "inner/rows_triton.py": "import triton.language",
        "inner/rows.py": "import triton.language",
        "lost.py": "from some_wheel.inner import left_out",
        "broken.py": "1 / 0",
    }.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "triton.language", raising=False)
    assert [line.partition(":")[0] for line in iter_import_faults(package)] == [
        "some_wheel.broken",
        "some_wheel.inner.linter",
        "some_wheel.inner.rows",
        "some_wheel.lost",
    ]
