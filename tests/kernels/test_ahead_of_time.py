"""Every Triton kernel, at every configuration that ships, compiled for the GPUs we mean: no GPU is needed for that.

A kernel that spills registers, needs more shared memory than the device has, multiplies without the matrix unit or
loads without overlapping is a defect, and none of these is an error to the compiler.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from genssd.kernels import logprob_triton  # noqa: E402


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU: its shared memory per block, the instruction of its matrix unit, that of its asynchronous loads."""

    backend: str
    arch: int | str
    warp: int
    shared_bytes: int
    matrix: str
    asynchronous: str

    @property
    def capability(self) -> int:
        return self.arch if isinstance(self.arch, int) else 0


pytestmark = pytest.mark.slow

TARGETS = [
    pytest.param(Target("cuda", 80, 32, 163 << 10, r"\bHMMA", "LDGSTS"), id="sm_80"),
    pytest.param(Target("cuda", 90, 32, 227 << 10, r"\bHGMMA", "LDGSTS|UTMALDG"), id="sm_90"),
    pytest.param(Target("cuda", 100, 32, 227 << 10, r"\bUTC\w*MMA", "LDGSTS|UTMALDG"), id="sm_100"),
    pytest.param(Target("hip", "gfx942", 64, 64 << 10, r"\bv_mfma", r"buffer_load|global_load"), id="gfx942"),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_for(target: Target, kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """Compile with pointers and sizes divisible by 16, as the launcher finds them for real models."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in ALIGNED]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=options)


ALIGNED = ("V", "D", "stride_n", "stride_v")


def machine_code(compiled: Any, target: Target, directory: Path) -> str:
    """The disassembly, after checking that nothing lives on the stack."""
    if target.backend == "hip":
        text = str(compiled.asm["amdgcn"])
        assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", text) == ["0"]
        assert re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text) == ["0"]
        return text
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    assert re.findall(r"STACK:(\d+)", usage.stdout) == ["0"]
    assert re.findall(r"LOCAL:(\d+)", usage.stdout) == ["0"]
    text = subprocess.run([tools / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(LDL|STL)\b", text), "registers are spilled"
    return text


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias-softcap"])
def test_score_split_kernel(target: Target, dtype: str, extras: bool, tmp_path: Path) -> None:
    tiles = logprob_triton.tiles_for(DTYPES[dtype], amd=target.backend == "hip", capability=target.capability)
    sizes = dict.fromkeys(("N", "V", "D", "stride_n", "stride_v", "tiles_per_split"), "i32")
    types = {
        **dict.fromkeys(("hidden", "weight", "bias"), f"*{dtype}"),
        "target": "*i64",
        **dict.fromkeys(("partial", "chosen"), "*fp32"),
        **sizes,
        **dict.fromkeys(("temperature", "softcap"), "fp32"),
    }
    constants = {
        "BLOCK": tiles.block,
        "BLOCK_D": tiles.block_d,
        "HAS_BIAS": extras,
        "SOFTCAP": extras,
        "INTERPRET": False,
    }
    compiled = compile_for(
        target,
        logprob_triton._score_split_kernel,
        types,
        constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    assert compiled.metadata.shared <= target.shared_bytes
    code = machine_code(compiled, target, tmp_path)
    assert re.search(target.asynchronous, code)
    if dtype != "fp32":  # exact float32 products have no matrix instruction on NVIDIA's
        assert re.search(target.matrix, code)


@pytest.mark.parametrize("target", TARGETS)
def test_merge_splits_kernel(target: Target, tmp_path: Path) -> None:
    pointers = ("partial", "chosen", "logprob", "logsumexp", "entropy", "sum_p2")
    types = {**dict.fromkeys(pointers, "*fp32"), "rank": "*i32", "N": "i32", "S": "i32"}
    compiled = compile_for(target, logprob_triton._merge_splits_kernel, types, {"BLOCK": 128}, num_warps=4)
    machine_code(compiled, target, tmp_path)
