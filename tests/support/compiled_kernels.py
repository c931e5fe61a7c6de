"""What a compiled Triton kernel needs and which instructions it has, looked up where the same was compiled before.

A compilation takes a second, and gives the same for the same kernel, Triton, GPU and constants.
`tests/kernels/compiled_kernels.jsonl` holds what it gave: a line per compilation, under a hash of all of these, after
the version of Triton. What the file does not have is compiled, so that a changed kernel is.
GENSSD_AHEAD_OF_TIME=all looks nothing up; GENSSD_AHEAD_OF_TIME=write adds what is missing, and removes the lines that
no test asked for.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RECORD = Path(__file__).parents[1] / "kernels" / "compiled_kernels.jsonl"
MODE = os.environ.get("GENSSD_AHEAD_OF_TIME", "")
"""all: look nothing up. write: add what is missing to the record."""

COPIES = r"\bcp\.async\.c[ag]\.shared"
BOXES = r"\bcp\.async\.bulk\.tensor"
INSTRUCTIONS: dict[str, dict[str, str]] = {
    "cuda": {
        "mma": r"\bmma\.sync",
        "wgmma": r"\bwgmma\.mma_async",
        "tcgen05": r"\btcgen05\.mma",
        "copies": COPIES,
        "boxes": BOXES,
        "wide": r"\bld\.global[\w.:]*\.(?:v4\.[bfsu]32|v2\.[bfsu]64)\b",
    },
    "hip": {
        "mfma": r"\bv_mfma",
        "loads": r"buffer_load|global_load",
        "wide": r"(?:global|buffer)_load_dwordx[24]",
    },
}
"""Instructions that tests look for, by backend: those of PTX, which ptxas translates one by one
(`test_instructions_of_ptx_are_those_of_the_machine`), or of AMD's machine code. copies and boxes are asynchronous
loads, the latter by descriptor; wide are loads of 8 bytes and more."""
SHAPES = r"\bwgmma\.mma_async\.sync\.aligned\.(m64n\d+k\d+)"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel needs, and its instructions."""

    shared: int
    """Bytes of shared memory per block."""
    stack: int
    """Bytes of stack per thread; registers that do not fit are spilled there."""
    spilled: int
    """Bytes of local memory per thread on NVIDIA's GPUs, spilled vector registers on AMD's."""
    instructions: list[str]
    """Names from INSTRUCTIONS, and the shapes of wgmma products."""


def compile_kernel(target: Any, kernel: Any, signature: dict[str, str], constants: dict[str, Any], attributes: Any,
                   **options: int) -> Any:  # fmt: skip
    """Compile a kernel for a GPU; return Triton's compiled kernel."""
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=options)


def inspect_kernel(compiled: Any, backend: str) -> Compiled:
    """Return what a compiled kernel needs, and its instructions."""
    text = str(compiled.asm["amdgcn" if backend == "hip" else "ptx"])
    instructions = [name for name, pattern in INSTRUCTIONS[backend].items() if re.search(pattern, text)]
    if backend == "hip":
        (spilled,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
        (stack,) = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)
    else:
        instructions += sorted(set(re.findall(SHAPES, text)))
        usage = run_tool(compiled, "cuobjdump", "-res-usage")
        (stack,), (spilled,) = re.findall(r"STACK:(\d+)", usage), re.findall(r"LOCAL:(\d+)", usage)
    return Compiled(compiled.metadata.shared, int(stack), int(spilled), instructions)


def run_tool(compiled: Any, tool: str, *flags: str) -> str:
    """Return what one of NVIDIA's tools says of a kernel's machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / tool, *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def look_up(target: Any, kernel: Any, signature: dict[str, str], constants: dict[str, Any], attributes: Any,
            **options: int) -> Compiled:  # fmt: skip
    """Return what the record has of a compilation, or compile."""
    parts = [triton.__version__, INSTRUCTIONS[target.backend], SHAPES, target.backend, target.arch, target.warp]
    parts += [source_of(kernel), signature, constants, attributes, options]
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    record = read_record()
    if MODE == "all" or key not in record:
        compiled = compile_kernel(target, kernel, signature, constants, attributes, **options)
        record[key] = inspect_kernel(compiled, target.backend)
    if MODE == "write":
        USED[key] = {"key": key, "gpu": target.arch, "kernel": kernel.__name__, **dataclasses.asdict(record[key])}
    return record[key]


@functools.cache
def read_record() -> dict[str, Compiled]:
    """Return what the record has, by key; nothing where another Triton compiled."""
    version, *lines = RECORD.read_text().splitlines()
    if json.loads(version) != {"triton": triton.__version__}:
        return {}
    names = [field.name for field in dataclasses.fields(Compiled)]
    return {row["key"]: Compiled(**{name: row[name] for name in names}) for row in map(json.loads, lines)}


USED: dict[str, dict[str, Any]] = {}
"""The lines that tests asked for, by key, where the record is written."""


def write_record() -> None:
    """Write the lines that tests asked for, and no others."""
    rows = sorted(USED.values(), key=lambda row: (row["kernel"], str(row["gpu"]), row["key"]))
    lines = [json.dumps(row) + "\n" for row in [{"triton": triton.__version__}, *rows]]
    RECORD.write_text("".join(lines))


@functools.cache
def source_of(function: JITFunction[Any]) -> str:
    """Return the text of a kernel, of the functions of this package that it calls, and the values of its globals."""
    texts = {function.__name__: function.src}
    pending = [function]
    while pending:
        caller = pending.pop()
        for name, value in sorted(referenced(caller).items()):
            if isinstance(value, JITFunction) and value.__module__.startswith("genssd."):
                if name not in texts:
                    texts[name] = value.src
                    pending.append(value)
                assert texts[name] == value.src, f"two functions are called {name}"
            elif not callable(value) and not isinstance(value, ModuleType):
                texts[name] = repr(value)
    return repr(sorted(texts.items()))


def referenced(function: JITFunction[Any]) -> dict[str, Any]:
    """Return the globals that a function names, and the members that it names of modules of this package."""
    space, found = function.fn.__globals__, {}
    for node in ast.walk(function.parse()):
        if isinstance(node, ast.Name) and node.id in space:
            found[node.id] = space[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = space.get(node.value.id)
            if isinstance(module, ModuleType) and module.__name__.startswith("genssd."):
                found[node.attr] = getattr(module, node.attr)
    return found
