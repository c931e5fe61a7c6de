"""The structure of the code: the direction of imports, the size of files and functions, docstrings that read alone.

csrc  <-  kernels  <-  engine  <-  distill  <-  genssd
within engine:   common, host  <-  families  <-  checkpoints  <-  texts  <-  readers, cache  <-  models  <-  criteria
                 <-  decoding  <-  served  <-  setup  <-  calls  <-  search  <-  engine.py
within distill:  files, pages, pool  <-  runs  <-  answers  <-  data  <-  select, train, diagnose  <-  score, report
                 <-  the commands above
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "engine", "distill")
LEVELS = (
    {"_core"},
    {"kernels"},
    {"engine.common"},
    {"engine.host", "engine.families"},
    {"engine.checkpoints"},
    {"engine.texts"},
    {"engine.readers", "engine.cache"},
    {"engine.models"},
    {"engine.criteria"},
    {"engine.decoding"},
    {"engine.served"},
    {"engine.setup"},
    {"engine.calls"},
    {"engine.search"},
    {"engine"},
    {"distill.files", "distill.pages", "distill.pool"},
    {"distill.runs"},
    {"distill.answers", "distill.small_pair"},
    {"distill.data"},
    {"distill.select", "distill.train", "distill.diagnose"},
    {"distill.score", "distill.report"},  # leaf.py loads models as training does; report reads the runs above
    {"distill"},
    {"distill.evaluate", "distill.tune"},
    {"distill.rounds"},
    {"distill.demo", "distill.reproduce", "distill.doctor"},  # they run the commands above, and examine what these read
)
"""The rooms of the code from the lowest to the highest: a room imports from those below it."""
RANKS = {name: rank for rank, level in enumerate(LEVELS) for name in level}
TOP = len(LEVELS)

OPTIONAL = {
    "triton",
    "peft",
    "wandb",
    "trackio",
    "torch.utils.tensorboard",
    "datasets",
    "pyarrow",
    "zstandard",
    "compression",
    "ray",
}
"""Packages that a function may import when it runs, because they need not be installed."""

MAX_FILE, MAX_FUNCTION = 350, 60  # lines
OVERSIZE: dict[str, str] = {}
"""Files and functions above the limits outside kernels/, each with the reason why it is better whole."""

pytestmark = pytest.mark.source


def modules() -> dict[str, Path]:
    found = {f"genssd.{p.stem}": p for p in (ROOT / "src/genssd").glob("*.py") if p.stem != "__init__"}
    found["genssd"] = ROOT / "src/genssd/__init__.py"
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*.py"):
            found["genssd." + ".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


def imported(tree: ast.AST, path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {node.module} - {"genssd"}
    return names


def imports(path: Path) -> set[str]:
    names = imported(ast.parse(path.read_text()), path)
    return {name for name in names if name == "genssd" or name.startswith("genssd.")}


def room(module: str) -> str:
    """The layer of a module, or the folder of engine or distill that it is in."""
    parts = module.split(".")[1:]
    folder = ".".join(parts[:2])
    return folder if folder in RANKS else ".".join(parts[:1])


def rank(module: str) -> int:
    return RANKS.get(room(module), TOP)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_no_arrow_points_up() -> None:
    found = modules()
    assert len(found) > 30
    for module, path in found.items():
        if module == "genssd":
            continue  # its lazy imports name what it serves
        for name in imports(path) & {*found, "genssd._core"}:
            assert rank(name) <= rank(module), f"{module} imports {name}"
            if rank(name) == rank(module) < TOP:
                assert room(name) == room(module), f"{module} imports {name}: neither is below the other"


@pytest.mark.parametrize("layer", ["engine", "distill"])
def test_every_folder_has_a_rank(layer: str) -> None:
    folders = {f"{layer}.{path.name}" for path in (ROOT / layer).iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders == {name for name in RANKS if name.startswith(f"{layer}.")}
    assert not [path for path in (ROOT / layer).glob("*/*/*.py")], "one level of folders"


def test_no_cycles() -> None:
    found = modules()
    graph = {m: imports(p) & found.keys() - {m} for m, p in found.items() if m != "genssd"}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_imports_stand_at_the_top_unless_they_are_optional() -> None:
    for module, path in modules().items():
        for function in functions(ast.parse(path.read_text())):
            for name in imported(function, path):
                optional = any(name == known or name.startswith(f"{known}.") for known in OPTIONAL)
                assert optional or re.search(r"_triton(\.|$)", name), f"{module}.{function.name} imports {name}"


def test_kernels_import_torch_and_the_core_only() -> None:
    allowed = {"torch", "triton", "numpy", "genssd", "__future__"}  # numpy: the arrays of the core's segment table
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imported(ast.parse(path.read_text()), path):
            top = name.split(".")[0]
            assert top in allowed or top in sys.stdlib_module_names, f"{path} imports {name}"


def test_the_folders_are_no_packages_of_their_own() -> None:
    for layer in LAYERS:
        assert not list((ROOT / layer).rglob("__init__.py"))
        assert (ROOT / "src/genssd" / layer).is_symlink()


def test_files_and_functions_fit_on_a_screen() -> None:
    large: set[str] = set()
    for folder in ("engine", "distill", "bench", "csrc", "examples", "src/genssd"):
        for path in (p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cpp", ".hpp")):
            name, text = str(path.relative_to(ROOT)), path.read_text()
            if text.count("\n") > MAX_FILE:
                large.add(name)
            if path.suffix == ".py":
                long = (f for f in functions(ast.parse(text)) if (f.end_lineno or 0) - f.lineno + 1 > MAX_FUNCTION)
                large |= {f"{name}:{f.name}" for f in long}
    assert large == set(OVERSIZE)


WRITES = {
    "write_text", "write_bytes", "save_file", "save_pretrained", "mkstemp", "NamedTemporaryFile", "TemporaryFile",
    "fdopen", "mkdir", "mkdtemp", "makedirs", "rename", "move", "copyfile", "copy2", "copytree", "truncate",
    "ftruncate", "to_csv", "dump", "tofile",
}  # fmt: skip
"""Names of functions and methods that write files by themselves."""
OWN_WRITES = {
    "distill/runs/writing.py": "the room in which every write of a command is done",
    "distill/train/saving.py": "transformers writes its own format; save_model reports what fails",
    "distill/train/adapters.py": "peft writes its own format, called by save_model",
    "distill/train/checkpoints.py": "safetensors writes its own format, under a temporary name",
    "distill/train/directories.py": "whole directories, which are synced and renamed",
    "distill/pool/ray_cluster.py": "the directory of a cluster that is started here, in which Ray writes",
    "distill/pool/ray_joining.py": "a temporary file that holds what Ray prints while it joins a cluster",
    "distill/files/pipes.py": "a temporary file that holds what a pipe gave",
    "distill/small_pair/make.py": "a program of the developers",
    "distill/small_pair/models.py": "a program of the developers",
    "kernels/tune_file.py": "the tune file, below the room of writes; it is replaced in one step",
    "src/genssd/streams.py": "the null device in place of a closed stream",
}
"""Files that write by themselves, each with the reason."""
ROOM = {"write_text", "write_bytes", "truncate"}
"""Functions of distill/runs/writing.py, which are called by their bare names."""


def writes(tree: ast.AST) -> Iterator[str]:
    """Yield the calls that write files by themselves."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in WRITES and (is_method or name not in ROOM):
            yield name
        elif name == "open":
            mode = next((k.value for k in node.keywords if k.arg == "mode"), None)
            place = 0 if is_method else 1
            mode = node.args[place] if mode is None and len(node.args) > place else mode
            if isinstance(mode, ast.Constant) and isinstance(mode.value, str) and {*"wax+"} & {*mode.value}:
                yield "open"


def test_files_are_written_in_one_room() -> None:
    """Elsewhere a full disk would end in a traceback, or leave half of a file."""
    found = {
        str(path.relative_to(ROOT)): sorted({*writes(ast.parse(path.read_text()))})
        for path in modules().values()
        if [*writes(ast.parse(path.read_text()))]
    }
    assert {name: calls for name, calls in found.items() if name not in OWN_WRITES} == {}
    assert OWN_WRITES.keys() == found.keys()


MACHINE = re.compile(r"cpu_count|sched_getaffinity|/proc/meminfo|/sys/fs/cgroup|SC_PHYS_PAGES|getrlimit")
TORCH_THREADS = re.compile(r"torch\.[sg]et_num_(interop_)?threads")


def test_one_place_knows_the_machine_and_two_the_threads_of_torch() -> None:
    """What describes the whole machine knows no container; kernels with torch's number would fight its idle threads."""
    machine, torch_threads = set(), set()
    for module, path in modules().items():
        text = path.read_text()
        machine |= {module} if MACHINE.search(text) else set()
        torch_threads |= {module} if TORCH_THREADS.search(text) else set()
    assert machine == {"genssd.engine.host.machine"}
    # the small pair is made by a script of its own
    assert torch_threads == {"genssd.kernels.threads", "genssd.engine.host.threads", "genssd.distill.small_pair.make"}


RIDDLE = re.compile(r"(Of|The same|And|That|What it|Behind|As|Onto|Nothing|Under)\b")


def test_no_function_has_a_decorator_twice() -> None:
    """Later versions of Triton take a kernel that is compiled twice, earlier ones do not."""
    twice = [
        f"{path.name}: {node.name}"
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and len({ast.unparse(decorator) for decorator in node.decorator_list}) < len(node.decorator_list)
    ]
    assert not twice


COUNTED = re.compile(
    r" (?:(?!in |judges )[a-z-]+ )?(prompts|rows|traces|problems|responses|examples|steps|questions|candidates"
    r"|completions|results|rounds|pairs|labels|answers|generations|verdicts|nodes|replies|prefixes|trajectories|counterfactuals)\b"
)
"""Text after a number in a message, with a noun that needs its plural."""


def test_counts_in_messages_have_the_right_plural() -> None:
    """A number of things that may be one is written by `format_count`; constants, in capitals, are never one."""
    wrong = [
        f"{name}, line {value.lineno}: {ast.unparse(value.value)}{text.value!r}"
        for name, path in modules().items()
        if name.startswith(("genssd.commands", "genssd.engine", "genssd.distill"))
        and not name.startswith(("genssd.distill.small_pair", "genssd.distill.demo.run"))
        for joined in ast.walk(ast.parse(path.read_text()))
        if isinstance(joined, ast.JoinedStr)
        for value, text in itertools.pairwise(joined.values)
        if isinstance(value, ast.FormattedValue)
        and isinstance(text, ast.Constant)
        and COUNTED.match(str(text.value))
        and not ast.unparse(value.value).isupper()
    ]
    assert not wrong, "\n".join(wrong)


def test_docstrings_can_be_read_alone() -> None:
    """Attribute docstrings (strings after a field) count as well: they are the help texts of the commands."""
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                text = node.value.value
                assert not RIDDLE.match(text), f"{module}, line {node.lineno}: {text[:60]!r} has no subject"
                assert text.strip()[-1] in ".:)|" or "\n" in text or " " not in text, ()
