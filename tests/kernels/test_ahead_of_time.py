"""Compilation of every Triton kernel, at every shipped configuration, for all supported GPUs; no GPU is needed.

A kernel that spills registers, needs more shared memory than the device has, multiplies without the matrix unit or
loads without overlapping is a defect, and none of these is an error to the compiler.
"""

from __future__ import annotations

import dataclasses
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

from genssd.kernels import (  # noqa: E402
    activation_triton,
    attention_kernels_triton,
    attention_launch_triton,
    attention_mass_triton,
    cache_triton,
    device_table,
    divergence_triton,
    draw_triton,
    experts_triton,
    filter_judge_triton,
    filter_lists_triton,
    filter_search_triton,
    filter_triton,
    head_triton,
    logprob_triton,
    norm_triton,
    rows_triton,
)
from genssd.kernels.attention_launch_triton import AttentionTiles  # noqa: E402
from genssd.kernels.head_triton import HeadTiles  # noqa: E402


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU: its shared memory per block, the instruction of its matrix unit, of its asynchronous and wide loads.

    The instructions are of the text that `assembly` returns: PTX, which ptxas translates one by one
    (`test_instructions_of_ptx_are_those_of_the_machine`), or AMD's machine code.
    """

    backend: str
    arch: int | str
    warp: int
    shared_bytes: int
    matrix: str
    asynchronous: str
    wide: str

    @property
    def capability(self) -> int:
        return self.arch if isinstance(self.arch, int) else 0


pytestmark = pytest.mark.slow

WIDE = r"\bld\.global[\w.:]*\.(?:v4\.[bfsu]32|v2\.[bfsu]64)\b"
COPIES = r"\bcp\.async\.c[ag]\.shared"
BOXES = r"\bcp\.async\.bulk\.tensor"
"""Loads by descriptor."""
TARGETS = [
    pytest.param(Target("cuda", 80, 32, 163 << 10, r"\bmma\.sync", COPIES, WIDE), id="sm_80"),
    pytest.param(Target("cuda", 90, 32, 227 << 10, r"\bwgmma\.mma_async", f"{COPIES}|{BOXES}", WIDE), id="sm_90"),
    pytest.param(Target("cuda", 100, 32, 227 << 10, r"\btcgen05\.mma", f"{COPIES}|{BOXES}", WIDE), id="sm_100"),
    pytest.param(
        Target(
            "hip", "gfx942", 64, 64 << 10, r"\bv_mfma", r"buffer_load|global_load", r"(?:global|buffer)_load_dwordx[24]"
        ),
        id="gfx942",
    ),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_for(target: Target, kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """Compile with pointers and sizes divisible by 16, as the launcher finds them for real models."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in ALIGNED]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp), options=options)


ALIGNED = (
    "V", "U", "D", "L", "stride", "stride_z", "stride_n", "stride_v", "stride_b", "stride_x", "stride_dx",
    "stride_student", "stride_teacher", "F", "entries", "stride_residual", "stride_h", "stride_cos", "stride_sin",
    "stride_page", "stride_slot", "stride_group", "stride_qt", "stride_qh", "stride_kt", "stride_kh",
    "M", "stride_e", "stride_m",
)  # fmt: skip


TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def assembly(compiled: Any, target: Target, directory: Path, stack: int = 0) -> str:
    """Return the kernel's assembly, after checking that its machine code uses no stack and no local memory.

    Registers that do not fit are spilled to the stack, of which `stack` bytes are allowed.
    """
    if target.backend == "hip":
        text = str(compiled.asm["amdgcn"])
        assert re.findall(r"\.vgpr_spill_count:\s+(\d+)", text) == ["0"]
        assert re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text) == ["0"]
        return text
    usage = run_tool(compiled, directory, "cuobjdump", "-res-usage")
    assert [int(size) for size in re.findall(r"STACK:(\d+)", usage)] in ([0], [stack])
    assert re.findall(r"LOCAL:(\d+)", usage) == ["0"]
    return str(compiled.asm["ptx"])


MACHINE_CODE = {
    r"\bmma\.sync": r"\bHMMA",
    r"\bwgmma\.mma_async": r"\bHGMMA",
    r"\btcgen05\.mma": r"\bUTC\w*MMA",
    COPIES: r"\bLDGSTS",
    BOXES: r"\bUTMALDG",
    WIDE: r"\bLDG\.E\.128",
}
"""For each instruction of PTX that tests look for: that of the machine."""


def run_tool(compiled: Any, directory: Path, tool: str, *flags: str) -> str:
    """Return what one of NVIDIA's tools says of a kernel's machine code."""
    cubin = directory / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    return subprocess.run([TOOLS / tool, *flags, cubin], capture_output=True, text=True, check=True).stdout


SIZES = (
    "N", "B", "C", "S", "L", "V", "U", "D", "vocabulary", "tiles_per_split", "group", "stride_z", "top_k", "stride",
    "stride_n", "stride_v", "stride_b", "stride_x", "stride_dx", "stride_student", "stride_teacher", "F", "H", "G",
    "P", "first", "entries", "stride_residual", "stride_h", "stride_cos", "stride_sin", "stride_page", "stride_slot",
    "stride_group", "T", "R", "W", "GROUP", "stride_qt", "stride_qh", "stride_kt", "stride_kh",
    "X", "K", "M", "stride_e", "stride_m",
)  # fmt: skip
FACTORS = (
    "scale", "log_tail", "temperature", "softcap", "student_softcap", "teacher_softcap", "mix", "top_p", "log_min_p",
    "eps", "offset", "alpha", "limit",
)  # fmt: skip


def types_of(**pointers: str) -> dict[str, str]:
    return {**dict.fromkeys(SIZES, "i32"), **dict.fromkeys(FACTORS, "fp32"), **pointers}


def compile_tiles(target: Target, kernel: Any, dtype: str, tiles: HeadTiles, directory: Path, **constants: bool) -> str:
    """Compile a kernel over tiles of the head, check what only its assembly shows, and return the assembly."""
    pointers = dict.fromkeys(("hidden", "weight", "bias"), f"*{dtype}")
    if tiles.descriptors:
        pointers["hidden"] = f"tensordesc<{dtype}[{tiles.block_n}, {tiles.block_d}]>"
        pointers["weight"] = f"tensordesc<{dtype}[{tiles.block_v}, {tiles.block_d}]>"
    types = types_of(**pointers, target="*i64", partial="*fp32", chosen="*fp32", logits="*fp32")
    sizes = {"BLOCK_N": tiles.block_n, "BLOCK_V": tiles.block_v, "BLOCK_D": tiles.block_d}
    constants = {**sizes, "DESCRIPTORS": tiles.descriptors, "INTERPRET": False, **constants}
    compiled = compile_for(target, kernel, types, constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    assert compiled.metadata.shared <= target.shared_bytes
    code = assembly(compiled, target, directory)
    assert re.search(BOXES if tiles.descriptors else target.asynchronous, code)
    if dtype != "fp32":  # exact float32 products have no matrix instruction on NVIDIA's
        assert re.search(target.matrix, code)
    return code


def shipped_tiles(target: Target, dtype: str, operator: str = "score", *, extras: bool = True) -> set[HeadTiles]:
    """Return the tiles that a device takes for all numbers of rows and modes, with and without descriptors.

    Left out is what another kernel shows: of tiles that differ in the number of stages alone, the fewer stages, which
    take less shared memory; without descriptors, the kernels without extras, which hold fewer registers; of fp16 all
    but the largest tile, because its code is that of bf16 with another product.
    """
    tiles = {
        head_triton.choose_shipped(
            operator, DTYPES[dtype], rows,  # type: ignore[arg-type]
            amd=target.backend == "hip", capability=target.capability, deterministic=deterministic,
        ).tiles
        for rows in (1, 64, 65, 128, 129, 512, 513, 8192)
        for deterministic in (True, False)
    }  # fmt: skip
    tiles = {max(same, key=lambda tile: tile.num_stages) for same in group_by_stages(tiles)}
    if dtype == "fp16":
        return {max(tiles, key=lambda tile: (tile.block_n, tile.block_v))}
    return tiles | {dataclasses.replace(tile, descriptors=False) for tile in tiles} if extras else tiles


def group_by_stages(tiles: set[HeadTiles]) -> list[list[HeadTiles]]:
    """Return groups of tiles that differ in the number of stages alone."""
    groups: dict[HeadTiles, list[HeadTiles]] = {}
    for tile in tiles:
        groups.setdefault(dataclasses.replace(tile, num_stages=0), []).append(tile)
    return list(groups.values())


of_head = pytest.mark.parametrize(
    ("dtype", "extras"),
    [("bf16", False), ("bf16", True), ("fp16", True), ("fp32", True)],
    ids=["bf16", "bf16-bias-softcap", "fp16-bias-softcap", "fp32-bias-softcap"],
)


@pytest.mark.parametrize("target", TARGETS)
@of_head
def test_scoring_tiles(target: Target, dtype: str, extras: bool, tmp_path: Path) -> None:
    for tiles in shipped_tiles(target, dtype, extras=extras):
        code = compile_tiles(
            target, logprob_triton._score_split_kernel, dtype, tiles, tmp_path,
            HAS_BIAS=extras, SOFTCAP=extras, SCALED=extras,
        )  # fmt: skip
        if target.arch == 90 and tiles.descriptors:
            assert f"wgmma.mma_async.sync.aligned.m64n{tiles.block_v}k16" in code


@pytest.mark.parametrize("target", TARGETS)
@of_head
def test_logits_tiles(target: Target, dtype: str, extras: bool, tmp_path: Path) -> None:
    for tiles in shipped_tiles(target, dtype, "logits", extras=extras):
        compile_tiles(target, draw_triton._logits_kernel, dtype, tiles, tmp_path, HAS_BIAS=extras, SOFTCAP=extras)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_target_tiles(target: Target, dtype: str, tmp_path: Path) -> None:
    tilings = [logprob_triton.choose_target_tiling(tiles) for tiles in shipped_tiles(target, dtype)]
    for tiling in (tiling for i, tiling in enumerate(tilings) if tiling not in tilings[:i]):
        types = types_of(**dict.fromkeys(("hidden", "weight", "bias"), f"*{dtype}"), target="*i64", chosen="*fp32")
        options = {name: tiling.pop(name) for name in ("num_warps", "num_stages")}
        constants = {**tiling, "HAS_BIAS": True, "SOFTCAP": True, "INTERPRET": False}
        compiled = compile_for(target, logprob_triton._target_kernel, types, constants, **options)
        assert compiled.metadata.shared <= target.shared_bytes
        code = assembly(compiled, target, tmp_path)
        assert dtype == "fp32" or re.search(target.matrix, code)


ROWWISE = {
    "merge-scores": (
        logprob_triton._merge_splits_kernel,
        dict.fromkeys(("partial", "chosen", "logprob", "logsumexp", "entropy", "sum_p2"), "*fp32") | {"rank": "*i32"},
        {"ROWS": logprob_triton.MERGED_ROWS, "BLOCK_S": logprob_triton.MERGED_SPLITS}, 4,
    ),
    "score-logits": (
        logprob_triton._score_logits_kernel,
        {**dict.fromkeys(("x", "chosen", "partial"), "*fp32"), "bias": "*bf16", "target": "*i64"},
        {
            "SPLIT": logprob_triton.LOGITS_SPLIT, "BLOCK": logprob_triton.LOGITS_BLOCK, "HAS_BIAS": True,
            "SCALED": True, "SOFTCAP": True,
        },
        8,
    ),
    **{
        f"draw-greedy-{greedy}": (
            draw_triton._draw_split_kernel,
            {"logits": "*fp32", "key": "*i64", "partial": "*fp32", "winner": "*i32"},
            {
                "GREEDY": greedy, "SCALED": True, "SPLIT": draw_triton.DRAW_TILING.split,
                "BLOCK": draw_triton.DRAW_TILING.block,
            },
            draw_triton.DRAW_TILING.num_warps,
        )
        for greedy in (False, True)
    },
    "merge-draws": (
        draw_triton._draw_merge_kernel,
        {"partial": "*fp32", "winner": "*i32", "tokens": "*i64", "logprob": "*fp32"},
        {"ROWS": draw_triton.MERGED_ROWS, "BLOCK_S": draw_triton.MERGED_SPLITS}, 4,
    ),
    "logsumexp": (
        rows_triton._logsumexp_kernel,
        {"x": "*fp32", "peaks": "*fp32", "log_totals": "*fp32"},
        {"SPLIT": 8 * rows_triton.ROWS.block, "BLOCK": rows_triton.ROWS.block, "SOFTCAP": True},
        rows_triton.ROWS.num_warps,
    ),
    "merge-logsumexp": (
        rows_triton._merge_logsumexp_kernel,
        {"peaks": "*fp32", "log_totals": "*fp32", "out": "*fp32"},
        {"SPLITS": 8}, 1,
    ),
    **{
        f"softmax-gradient-{linear}": (
            rows_triton._softmax_gradient_kernel,
            {"x": "*fp32", "logsumexp": "*fp32", "coefficients": "*fp32", "dx": "*bf16"},
            {"BLOCK": rows_triton.ROWS.block, "SOFTCAP": True, "LINEAR": linear}, rows_triton.ROWS.num_warps,
        )
        for linear in (False, True)
    },
    "cross-entropy": (
        rows_triton._cross_entropy_kernel,
        {"x": "*fp32", "target": "*i64", "row_weight": "*fp32", "loss": "*fp32", "dx": "*bf16"},
        {"BLOCK": rows_triton.ROWS.block, "SOFTCAP": True}, rows_triton.ROWS.num_warps,
    ),
    **{
        f"divergence-{kind}{'-in-two-passes' if known else ''}": (
            divergence_triton._divergence_kernel,
            dict.fromkeys(("student", "teacher", "row_weight", "loss"), "*fp32") | {"dx": "*bf16"},
            {
                "BLOCK": divergence_triton.TILES.block, "KIND": code, "MEAN_KNOWN": known, "STUDENT_SOFTCAP": True,
                "TEACHER_SOFTCAP": True,
            },
            divergence_triton.TILES.num_warps,
        )
        for kind, code in divergence_triton.KINDS.items() for known in (False, True)[: 2 if kind == "forward_kl" else 1]
    },
}  # fmt: skip


STACKS = {("divergence-skew_reverse_kl", 100): 8, ("draw_kernel", 80): 8}
"""Bytes of stack that a kernel takes on a GPU: ptxas of Triton 3.7 puts one address there, once per block of a row."""
ATTENTION_STACKS = {
    ("unit_kernel", 90, "fp32", 80): 24, ("unit_kernel", 100, "fp32", 256): 8, ("finish_kernel", 90, "fp32", 80): 96,
    ("finish_kernel", 100, "fp32", 128): 136,
}  # fmt: skip
"""Bytes of stack that attention kernels with window, softcap and sinks take, by GPU, dtype and width of a head. They
come from ptxas of Triton 3.7; Triton 3.9 compiles the same kernels without a stack."""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ROWWISE)
def test_rowwise_kernels(target: Target, name: str, tmp_path: Path) -> None:
    kernel, pointers, constants, num_warps = ROWWISE[name]
    compiled = compile_for(target, kernel, types_of(**pointers), constants, num_warps=num_warps)
    assert compiled.metadata.shared <= target.shared_bytes
    assembly(compiled, target, tmp_path, STACKS.get((name, target.capability), 0))


FILTERS = {
    "-".join(names): {name: name in names for name in ("TOP_K", "TOP_P", "MIN_P")}
    for names in (("TOP_K",), ("TOP_P",), ("MIN_P",), ("TOP_K", "TOP_P", "MIN_P"))
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["split_statistics_kernel", "list_kernel"])
def test_filters_passes_over_splits(target: Target, name: str, tmp_path: Path) -> None:
    compile_filters(target, getattr(filter_lists_triton, name), {}, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(
    "kernel",
    [filter_lists_triton.bracket_kernel, filter_search_triton.select_kernel],
    ids=lambda kernel: kernel.__name__,
)
def test_filters(target: Target, filters: str, kernel: Any, tmp_path: Path) -> None:
    compile_filters(target, kernel, FILTERS[filters], tmp_path)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("filters", ["TOP_K", "TOP_K-TOP_P-MIN_P"])
def test_search_that_judges(target: Target, filters: str, tmp_path: Path) -> None:
    tiles = dataclasses.replace(filter_triton.SHIPPED, judged=True)
    compile_filters(target, filter_search_triton.select_kernel, FILTERS[filters], tmp_path, tiles)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("split", [8192, 16384])
@pytest.mark.parametrize("name", ["peaks_kernel", "draw_kernel", "judge_kernel", "take_kernel"])
def test_filters_that_judge(target: Target, name: str, split: int, tmp_path: Path) -> None:
    warps, part = (8, 1024) if split == 8192 else (16, 2048)
    tiles = dataclasses.replace(filter_triton.SHIPPED, judged=True, split=split, split_warps=warps, part=part)
    filters = {"TOP_P": True, "MIN_P": True}
    compile_filters(target, getattr(filter_judge_triton, name), filters, tmp_path, tiles)


def compile_filters(
    target: Target,
    kernel: Any,
    filters: dict[str, bool],
    directory: Path,
    tiles: filter_triton.FilterTiles = filter_triton.SHIPPED,
) -> None:
    """Compile a kernel of the filters for a vocabulary of 151936, and check its machine code."""
    part = tiles.list_part if kernel.__name__ in ("list_kernel", "draw_kernel") else tiles.part
    sizes = {
        "STEP": tiles.step, "CUTS": tiles.cuts, "SPLIT": tiles.split, "PART": part, "SPLITS": 32,
        "NOISE": tiles.part // 2,
        "ROUNDS": tiles.rounds, "TILE": tiles.tile, "SEARCH": filter_triton.SEARCH_CUTS,
        "JUDGED": tiles.judged,
    }  # fmt: skip
    constants = {name: value for name, value in (sizes | filters).items() if name in kernel.arg_names}
    types = types_of(
        **dict.fromkeys(("logits", "peaks", "totals", "masses", "bracket"), "*fp32"),
        **dict.fromkeys(("values", "scores", "scratch", "weights", "winner_scores"), "*fp32"),
        **dict.fromkeys(("counts", "places", "ids", "winner_places"), "*i32"), key="*i64", tokens="*i64",
    )  # fmt: skip
    num_warps = {"select_kernel": tiles.row_warps, "take_kernel": tiles.row_warps, "bracket_kernel": 4}.get(
        kernel.__name__, tiles.split_warps
    )
    compiled = compile_for(target, kernel, types, constants, num_warps=num_warps)
    assert compiled.metadata.shared <= target.shared_bytes
    code = assembly(compiled, target, directory, STACKS.get((kernel.__name__, target.capability), 0))
    if "SPLIT" in constants and "logits" in kernel.arg_names:
        assert re.search(target.wide, code), "memory is read in small pieces"


def of_norm(width: int, add: bool, offset: bool = False) -> tuple[Any, dict[str, Any], int]:
    rows, block, num_warps = norm_triton.choose_tiling(width)
    constants = {"ADD": add, "OFFSET": offset, "ROWS": rows, "BLOCK": block}
    return norm_triton._rms_norm_kernel, constants, num_warps


def of_write(
    width: int, norm: bool, rotated: int | None = None, offset: bool = False
) -> tuple[Any, dict[str, Any], int]:
    rotated = rotated or width
    half, rest, num_warps = cache_triton.choose_tiling(width, rotated)
    sizes = {"E": width, "R": rotated, "HALF": half, "REST": rest, "HEADS": cache_triton.HEADS}
    return cache_triton._write_kernel, {**sizes, "NORM": norm, "OFFSET": offset}, num_warps


FORWARD = {
    "norm-1024": of_norm(1024, add=False),
    **{f"add-norm-{width}": of_norm(width, add=True) for width in (128, 4096, 16384)},
    **{
        gate: (activation_triton._gated_kernel, {"GATE": number, "BLOCK": activation_triton.BLOCK}, 4)
        for gate, number in activation_triton.GATES.items()
        if gate != "clamped"
    },
    "write-kv-128": of_write(128, norm=False),
    **{f"normed-write-kv-{width}": of_write(width, norm=True) for width in (64, 80, 256)},
    "copy-pages": (cache_triton._copy_kernel, {"BLOCK": cache_triton.BLOCK}, 8),
}
VARIANTS = {
    "clamped": (activation_triton._gated_kernel, {"GATE": 2, "BLOCK": activation_triton.BLOCK}, 4),
    "sum-of-experts": (experts_triton._sum_kernel, {"K": 8, "PLACES": 8, "BLOCK": experts_triton.SUM_BLOCK}, 4),
    "add-norm-offset-16384": of_norm(16384, add=True, offset=True),
    "write-kv-96-of-128": of_write(128, norm=False, rotated=96),
    "normed-write-kv-64-of-256": of_write(256, norm=True, rotated=64, offset=True),
}
"""Kernels that differ from those of FORWARD in what they leave out or add, compiled for one dtype."""
POINTERS = ("x", "residual", "weight", "normed", "total", "gate_up", "out", "qkv", "q_norm", "k_norm", "q", "k_pages",
            "v_pages", "kv", "y")  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in FORWARD for dtype in DTYPES] + [(name, "bf16") for name in VARIANTS]
)
def test_forward_kernels(target: Target, dtype: str, name: str, tmp_path: Path) -> None:
    kernel, constants, num_warps = (FORWARD | VARIANTS)[name]
    pointers = dict.fromkeys(POINTERS, f"*{dtype}") | dict.fromkeys(("slot", "source", "destination", "expert"), "*i64")
    types = types_of(**pointers, cos="*fp32", sin="*fp32")
    code = assembly(compile_for(target, kernel, types, constants, num_warps=num_warps), target, tmp_path)
    assert re.search(target.wide, code), "memory is read in small pieces"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "gather"), [("bf16", True), ("fp32", False)])
def test_experts(target: Target, dtype: str, gather: bool, tmp_path: Path) -> None:
    pointers = dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}") | dict.fromkeys(("order", "start"), "*i64")
    tiles = {
        experts_triton.choose_tiles(DTYPES[dtype], rows, amd=target.backend == "hip", capability=target.capability)
        for rows in (1, 17, 65)
    }
    for shape in tiles:
        options = experts_triton.launch_options(shape)
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        constants = {**options, "GATHER": gather, "HAS_BIAS": True, "EXPERTS": 128}
        compiled = compile_for(target, experts_triton._grouped_kernel, types_of(**pointers), constants, **launch)
        assert compiled.metadata.shared <= target.shared_bytes
        code = assembly(compiled, target, tmp_path)
        assert re.search(target.wide, code) or re.search(target.asynchronous, code)
        assert dtype == "fp32" or re.search(target.matrix, code)


MASS = {
    "lse": attention_mass_triton._lse_kernel,
    "row_mass": attention_mass_triton._row_mass_kernel,
    "dq": attention_mass_triton._dq_kernel,
    "dk": attention_mass_triton._dk_kernel,
}
INDEX = ("rows", "columns", "step", "word", "word_start", "first_row")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "width"), [("bf16", 64), ("bf16", 128), ("fp16", 256)])
@pytest.mark.parametrize("name", MASS)
def test_attention_mass(target: Target, dtype: str, width: int, name: str, tmp_path: Path) -> None:
    tiles = attention_mass_triton.choose_tiles(width, gradient=name in ("dq", "dk"))
    types = types_of(
        **dict.fromkeys(("q", "k", "dq", "dk"), f"*{dtype}"), **dict.fromkeys(INDEX, "*i32"),
        **dict.fromkeys(("lse", "row_mass", "d_mass", "unit", "delta"), "*fp32"),
    )  # fmt: skip
    options = attention_mass_triton.launch_options(width, tiles)
    num_warps, num_stages = options.pop("num_warps"), options.pop("num_stages")
    constants = {**options, "BLOCK_W": tiles.words} if name == "row_mass" else options
    compiled = compile_for(target, MASS[name], types, constants, num_warps=num_warps, num_stages=num_stages)
    assert compiled.metadata.shared <= target.shared_bytes
    assert re.search(target.matrix, assembly(compiled, target, tmp_path))


@pytest.mark.parametrize("target", TARGETS)
def test_sums_over_steps(target: Target, tmp_path: Path) -> None:
    types = types_of(row_mass="*fp32", order="*i32", step_start="*i32", mass="*fp32")
    constants = {"BLOCK_R": 32, "BLOCK_W": 64}
    assembly(compile_for(target, attention_mass_triton._sum_steps_kernel, types, constants), target, tmp_path)


def compile_attention(
    target: Target, kernel: str, dtype: str, width: int, extras: bool, *, joined: bool = False
) -> tuple[Any, AttentionTiles]:
    """Compile one of attention's kernels as it ships.

    extras: a window, sinks and a cap on the scores. joined: for tables with chains and shared parts.
    """
    tiles = attention_launch_triton.choose_tiles(
        DTYPES[dtype], width, amd=target.backend == "hip", capability=target.capability
    )
    block_e = int(triton.next_power_of_2(width))
    boxes = f"tensordesc<{dtype}[{tiles.block_t}, {block_e}]>" if tiles.tma else f"*{dtype}"
    pointers = {
        **dict.fromkeys(("q", "k_pages", "v_pages", "out"), f"*{dtype}"),
        **dict.fromkeys(("k_tiles", "v_tiles"), boxes),
        **dict.fromkeys(("header", "items", "entries", "units", "rows", "pages"), "*i32"),
        **dict.fromkeys(("peaks", "totals", "values", "sinks"), "*fp32"),
    }
    table = {name: getattr(device_table, name) for name in ("ITEM", "ENTRY", "UNIT", "ROW")}
    block_m, num_warps, num_stages = {
        "item_kernel": (tiles.block_m, tiles.num_warps, tiles.num_stages),
        "unit_kernel": (tiles.unit_m, tiles.unit_warps, tiles.unit_stages),
        "finish_kernel": (tiles.tail_m, tiles.tail_warps, tiles.tail_stages),
    }[kernel]
    masked_tma = tiles.window_tma if extras else tiles.masked_tma
    masked_tma = tiles.tail_tma if kernel == "finish_kernel" else masked_tma
    constants = {
        "S": 64, "E": width, "GROUP": 4, "BLOCK_M": block_m, "BLOCK_T": tiles.block_t, "BLOCK_E": block_e,
        "WINDOW": extras, "SOFTCAP": extras, "FUSED": tiles.fused, "FLAT": tiles.flat, "HEADS": 4,
        "TMA": tiles.tma, "MASKED_TMA": masked_tma,
        "OVERLAP": tiles.overlap, "SINKS": extras, "SEGMENT": 512, "SHORTEST": 128, "INTERPRET": False,
        "CHAINED": joined, "RESUMED": joined, **table,
    }  # fmt: skip
    function = getattr(attention_kernels_triton, kernel)
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    types = {**types_of(**pointers), "strips": "i32", "window": "i32", **dict.fromkeys(("inner", "factor"), "fp32")}
    return compile_for(target, function, types, constants, num_warps=num_warps, num_stages=num_stages), tiles


HALF = [("bf16", 128, True), ("bf16", 256, True), ("bf16", 128, False)]
"""Widths below 128 take the tiles of 128 and fewer registers."""
SINGLE = [("fp32", width, True) for width in (64, 128, 256)]
ATTENTION = [*HALF, ("fp16", 128, True), *SINGLE]
ON_HOPPER = [
    *HALF,
    *(("bf16", 80, True), ("bf16", 96, True), ("fp16", 64, False), ("fp16", 256, False), ("fp32", 80, True)),
]
"""Float32 takes the same tiles on all of NVIDIA's and no instruction of Hopper's: the others compile its widths."""


@pytest.mark.parametrize(
    ("target", "dtype", "width", "extras"),
    [
        pytest.param(*target.values, *case, id=f"{target.id}-{case[0]}-{case[1]}-{'extras' if case[2] else 'plain'}")
        for target in TARGETS
        for case in (ON_HOPPER if target.id == "sm_90" else ATTENTION)
    ],
)
@pytest.mark.parametrize("kernel", ["item_kernel", "unit_kernel", "finish_kernel"])
def test_attention(target: Target, dtype: str, width: int, extras: bool, kernel: str, tmp_path: Path) -> None:
    compiled, tiles = compile_attention(target, kernel, dtype, width, extras)
    assert compiled.metadata.shared <= target.shared_bytes
    stack = ATTENTION_STACKS.get((kernel, target.capability, dtype, width), 0) if extras else 0
    code = assembly(compiled, target, tmp_path, stack)
    assert re.search(target.asynchronous, code)
    assert re.search(target.wide, code)  # of queries
    masked_tma = tiles.tail_tma if kernel == "finish_kernel" else tiles.window_tma
    if masked_tma or (tiles.tma and not extras):  # with a window every tile is masked
        assert re.search(BOXES, code)
    if target.arch == 90 and kernel == "item_kernel" and width == 128 and not extras:
        check_overlap(code)
    if dtype != "fp32":  # exact float32 products have no matrix instruction on NVIDIA's
        few = target.backend == "cuda" and tiles.block_m < 64  # rows, for the instruction of a warp group
        assert re.search(r"\bmma\.sync" if few else target.matrix, code)


EVENTS = {
    "mbarrier.try_wait": "arrived", "bar.sync": "barrier", "wgmma.commit_group": "product", "wgmma.wait_group": "wait",
}  # fmt: skip


def list_events(ptx: str) -> list[str]:
    """Return what a kernel waits for and what it multiplies, in the order of the code."""
    return [EVENTS[name] for name in re.findall("|".join(map(re.escape, EVENTS)), ptx)]


def check_overlap(ptx: str) -> None:
    """Check that a loop over tiles has no barrier from the first product to the second, and does not wait for that."""
    events, loop = list_events(ptx), ["arrived", "barrier", "product", "wait", "product", "barrier"]
    assert any(events[i : i + len(loop)] == loop for i in range(len(events))), events


@pytest.mark.parametrize("target", TARGETS)
def test_attention_over_chains_and_shared_parts(target: Target, tmp_path: Path) -> None:
    for kernel in ("item_kernel", "finish_kernel") if target.arch == 90 else ("item_kernel",):
        compiled, _ = compile_attention(target, kernel, "bf16", 128, False, joined=True)
        assert compiled.metadata.shared <= target.shared_bytes
        code = assembly(compiled, target, tmp_path)
        assert re.search(target.asynchronous, code)
        if target.arch == 90 and kernel == "item_kernel":
            check_overlap(code)


@pytest.mark.parametrize("target", [target for target in TARGETS if target.id != "gfx942"])
def test_instructions_of_ptx_are_those_of_the_machine(target: Target, tmp_path: Path) -> None:
    compiled = [compile_attention(target, "item_kernel", *case, True)[0] for case in (("bf16", 128), ("fp32", 64))]
    for kernel in compiled:
        code = run_tool(kernel, tmp_path, "nvdisasm", "-c")
        for instruction, of_machine in MACHINE_CODE.items():
            assert bool(re.search(instruction, kernel.asm["ptx"])) == bool(re.search(of_machine, code)), instruction
        assert not re.search(r"\b(LDL|STL)\b", code), "registers are spilled"
