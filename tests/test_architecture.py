"""The direction of imports: csrc <- kernels <- engine <- distill <- genssd, without cycles."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANK = {"_core": 0, "kernels": 1, "engine": 2, "distill": 3}
TOP = 4

pytestmark = pytest.mark.source


def modules() -> dict[str, Path]:
    found = {f"genssd.{p.stem}": p for p in (ROOT / "src/genssd").glob("*.py") if p.stem != "__init__"}
    found["genssd"] = ROOT / "src/genssd/__init__.py"
    for layer in ("kernels", "engine", "distill"):
        for path in (ROOT / layer).rglob("*.py"):
            found["genssd." + ".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {node.module} - {"genssd"}
    return {name for name in names if name == "genssd" or name.startswith("genssd.")}


def rank(module: str) -> int:
    parts = module.split(".")
    return RANK.get(parts[1], TOP) if len(parts) > 1 else TOP


def test_no_arrow_points_up() -> None:
    found = modules()
    assert len(found) > 30
    for module, path in found.items():
        if module == "genssd":
            continue  # its lazy imports name what it serves
        for name in imports(path):
            if name in found or name == "genssd._core":
                assert rank(name) <= rank(module), f"{module} imports {name}"


def test_no_cycles() -> None:
    found = modules()
    graph = {m: imports(p) & found.keys() - {m} for m, p in found.items() if m != "genssd"}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_kernels_import_torch_and_the_core_only() -> None:
    allowed = {"torch", "triton", "numpy", "genssd", "__future__"}  # numpy: the arrays of the core's segment table
    import sys

    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert name is not None
                top = name.split(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_the_folders_are_no_packages_of_their_own() -> None:
    for layer in ("kernels", "engine", "distill"):
        assert not list((ROOT / layer).rglob("__init__.py"))
        assert (ROOT / "src/genssd" / layer).is_symlink()
