"""Compilation of every Triton kernel, at every shipped configuration, for all supported GPUs; no GPU is needed.

A kernel that spills registers, needs more shared memory than the device has, multiplies without the matrix unit or
loads without overlapping is a defect, and none of these is an error to the compiler. What was compiled before is looked
up (`support/compiled_kernels.py`).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from support.compiled_kernels import (  # noqa: E402
    INSTRUCTIONS,
    Compiled,
    compile_kernel,
    inspect_kernel,
    look_up,
    run_tool,
    source_of,
)

from genssd.kernels import (  # noqa: E402
    activation_triton,
    attention_kernels_triton,
    attention_launch_triton,
    attention_mass_triton,
    cache_triton,
    candidates_triton,
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
    loss_candidates_triton,
    loss_logits_triton,
    norm_triton,
    rows_triton,
    scale_triton,
)
from genssd.kernels.attention_launch_triton import AttentionTiles  # noqa: E402
from genssd.kernels.head_triton import HeadTiles  # noqa: E402


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU: its shared memory per block, the names of the instructions of its matrix unit and asynchronous loads."""

    backend: str
    arch: int | str
    warp: int
    shared_bytes: int
    matrix: str
    asynchronous: tuple[str, ...]

    @property
    def capability(self) -> int:
        return self.arch if isinstance(self.arch, int) else 0


pytestmark = pytest.mark.slow

TARGETS = [
    pytest.param(Target("cuda", 80, 32, 163 << 10, "mma", ("copies",)), id="sm_80"),
    pytest.param(Target("cuda", 90, 32, 227 << 10, "wgmma", ("copies", "boxes")), id="sm_90"),
    pytest.param(Target("cuda", 100, 32, 227 << 10, "tcgen05", ("copies", "boxes")), id="sm_100"),
    pytest.param(Target("hip", "gfx942", 64, 64 << 10, "mfma", ("loads",)), id="gfx942"),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_for(
    target: Target, kernel: Any, types: dict[str, str], constants: dict[str, Any], stack: int = 0, **options: int
) -> Compiled:
    """Compile with pointers and sizes divisible by 16, as the launcher finds them for real models.

    Checks that the kernel fits into shared memory and spills no register; `stack` bytes of stack are allowed.
    """
    compiled = look_up(target, kernel, *describe_arguments(kernel, types, constants), **options)
    assert compiled.shared <= target.shared_bytes
    assert compiled.stack in (0, stack)
    assert compiled.spilled == 0
    return compiled


def describe_arguments(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return the types, the constants and the divisibilities of a kernel's arguments, as Triton takes them."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in ALIGNED]
    return signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}


ALIGNED = (
    "V", "U", "D", "L", "stride", "stride_z", "stride_n", "stride_v", "stride_b", "stride_x", "stride_dx",
    "stride_student", "stride_teacher", "F", "entries", "stride_residual", "stride_h", "stride_cos", "stride_sin",
    "stride_page", "stride_slot", "stride_group", "stride_qt", "stride_qh", "stride_kt", "stride_kh",
    "M", "stride_e", "stride_m", "count",
)  # fmt: skip


MACHINE_CODE = {
    "mma": r"\bHMMA",
    "wgmma": r"\bHGMMA",
    "tcgen05": r"\bUTC\w*MMA",
    "copies": r"\bLDGSTS",
    "boxes": r"\bUTMALDG",
    "wide": r"\bLDG\.E\.128",
}
"""For each instruction of PTX that tests look for: that of the machine."""


SIZES = (
    "N", "B", "C", "S", "L", "V", "U", "D", "vocabulary", "tiles_per_split", "group", "stride_z", "top_k", "stride",
    "stride_n", "stride_v", "stride_b", "stride_x", "stride_dx", "stride_student", "stride_teacher", "F", "H", "G",
    "P", "first", "entries", "stride_residual", "stride_h", "stride_cos", "stride_sin", "stride_page", "stride_slot",
    "stride_group", "T", "R", "W", "GROUP", "stride_qt", "stride_qh", "stride_kt", "stride_kh",
    "X", "K", "M", "stride_e", "stride_m", "count",
)  # fmt: skip
FACTORS = (
    "scale", "log_tail", "temperature", "softcap", "student_softcap", "teacher_softcap", "mix", "top_p", "log_min_p",
    "eps", "offset", "alpha", "limit",
)  # fmt: skip


def types_of(**pointers: str) -> dict[str, str]:
    return {**dict.fromkeys(SIZES, "i32"), **dict.fromkeys(FACTORS, "fp32"), **pointers}


def compile_tiles(target: Target, kernel: Any, dtype: str, tiles: HeadTiles, **constants: bool) -> Compiled:
    """Compile a kernel over tiles of the head, and check its loads and products."""
    pointers = dict.fromkeys(("hidden", "weight", "bias"), f"*{dtype}")
    if tiles.descriptors:
        pointers["hidden"] = f"tensordesc<{dtype}[{tiles.block_n}, {tiles.block_d}]>"
        pointers["weight"] = f"tensordesc<{dtype}[{tiles.block_v}, {tiles.block_d}]>"
    types = types_of(**pointers, target="*i64", **dict.fromkeys(("partial", "chosen", "logits", "x"), "*fp32"))
    sizes = {"BLOCK_N": tiles.block_n, "BLOCK_V": tiles.block_v, "BLOCK_D": tiles.block_d}
    constants = {**sizes, "DESCRIPTORS": tiles.descriptors, "INTERPRET": False, **constants}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    compiled = compile_for(target, kernel, types, constants, num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    assert "boxes" in compiled.instructions if tiles.descriptors else loads_asynchronously(compiled, target)
    assert multiplies_by_matrix(compiled, target, dtype)
    return compiled


def loads_asynchronously(compiled: Compiled, target: Target) -> bool:
    return any(name in compiled.instructions for name in target.asynchronous)


def multiplies_by_matrix(compiled: Compiled, target: Target, dtype: str) -> bool:
    """Return whether the matrix unit multiplies; exact float32 products have no such instruction on NVIDIA's."""
    return dtype == "fp32" or target.matrix in compiled.instructions


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
def test_scoring_tiles(target: Target, dtype: str, extras: bool) -> None:
    for tiles in shipped_tiles(target, dtype, extras=extras):
        compiled = compile_tiles(
            target, logprob_triton._score_split_kernel, dtype, tiles,
            HAS_BIAS=extras, SOFTCAP=extras, SCALED=extras,
        )  # fmt: skip
        if target.arch == 90 and tiles.descriptors:
            assert f"m64n{tiles.block_v}k16" in compiled.instructions


@pytest.mark.parametrize("target", TARGETS)
@of_head
def test_logits_tiles(target: Target, dtype: str, extras: bool) -> None:
    for tiles in shipped_tiles(target, dtype, "logits", extras=extras):
        compile_tiles(target, draw_triton._logits_kernel, dtype, tiles, HAS_BIAS=extras, SOFTCAP=extras)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "softcap"), [("bf16", False), ("bf16", True), ("fp16", True)])
def test_tiles_that_take_normalizers(target: Target, dtype: str, softcap: bool) -> None:
    """Every candidate of a loss; those that differ in the number of stages alone once."""
    device = candidates_triton.Device(torch.device("cpu"), target.backend == "hip", target.capability, 132)
    candidates = loss_candidates_triton.loss_candidates("cross_entropy", device, DTYPES[dtype])
    tiles = {candidate.tiles for candidate in candidates if candidate.fused}
    assert tiles
    for same in group_by_stages(tiles):
        tile = max(same, key=lambda tile: tile.num_stages)
        compiled = compile_tiles(target, loss_logits_triton._write_kernel, dtype, tile, SOFTCAP=softcap)
        if target.arch == 90:
            assert f"m64n{tile.block_v}k16" in compiled.instructions


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_target_tiles(target: Target, dtype: str) -> None:
    tilings = [logprob_triton.choose_target_tiling(tiles) for tiles in shipped_tiles(target, dtype)]
    for tiling in (tiling for i, tiling in enumerate(tilings) if tiling not in tilings[:i]):
        types = types_of(**dict.fromkeys(("hidden", "weight", "bias"), f"*{dtype}"), target="*i64", chosen="*fp32")
        options = {name: tiling.pop(name) for name in ("num_warps", "num_stages")}
        constants = {**tiling, "HAS_BIAS": True, "SOFTCAP": True, "INTERPRET": False}
        compiled = compile_for(target, logprob_triton._target_kernel, types, constants, **options)
        assert multiplies_by_matrix(compiled, target, dtype)


PER_WARP = {
    "cross_entropy": rows_triton.ROWS.block // rows_triton.ROWS.num_warps,
    "divergence": divergence_triton.TILES.block // divergence_triton.TILES.num_warps,
}
"""Entries of a row that a warp holds in the passes of a loss. The most warps have the fewest registers each."""


def of_divergence(
    kind: str, *, mean_known: bool, normalized: bool = False, warps: int = divergence_triton.TILES.num_warps
) -> tuple[Any, dict[str, str], dict[str, Any], int]:
    logits = ("student", "teacher", "row_weight", "loss", "student_normalizer", "teacher_normalizer")
    constants = {
        "BLOCK": warps * PER_WARP["divergence"], "KIND": divergence_triton.KINDS[kind], "MEAN_KNOWN": mean_known,
        "STUDENT_SOFTCAP": True, "TEACHER_SOFTCAP": True, "STUDENT_KNOWN": normalized, "TEACHER_KNOWN": normalized,
    }  # fmt: skip
    return divergence_triton._divergence_kernel, dict.fromkeys(logits, "*fp32") | {"dx": "*bf16"}, constants, warps


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
    **{
        f"cross-entropy{'-normalized' if known else ''}-{warps}": (
            rows_triton._cross_entropy_kernel,
            {**dict.fromkeys(("x", "normalizer", "row_weight", "loss"), "*fp32"), "target": "*i64", "dx": "*bf16"},
            {"BLOCK": warps * PER_WARP["cross_entropy"], "SOFTCAP": True, "KNOWN": known}, warps,
        )
        for warps, known in ((rows_triton.ROWS.num_warps, False), (rows_triton.ROWS.num_warps, True), (32, False))
    },
    "merge-normalizers": (
        loss_logits_triton._merge_kernel,
        {"partial": "*fp32", "normalizer": "*fp32"},
        {"ROWS": loss_logits_triton.MERGED_ROWS, "BLOCK_S": loss_logits_triton.MERGED_SPLITS}, 4,
    ),
    **{
        f"scale-{dtype}": (
            scale_triton._scale_kernel,
            {"gradient": f"*{dtype}", "factor": "*fp32", "out": "*bf16"},
            {"BLOCK": scale_triton.BLOCK}, scale_triton.NUM_WARPS,
        )
        for dtype in ("fp32", "bf16")
    },
    **{
        f"divergence-{kind}{'-in-two-passes' if known else ''}": of_divergence(kind, mean_known=known)
        for kind in divergence_triton.KINDS for known in (False, True)[: 2 if kind == "forward_kl" else 1]
    },
    **{
        f"normalized-divergence-{kind}": of_divergence(kind, mean_known=kind == "forward_kl", normalized=True)
        for kind in divergence_triton.KINDS
    },
    **{
        f"wide-divergence-{kind}": of_divergence(kind, mean_known=kind == "forward_kl", warps=32)
        for kind in ("forward_kl", "jsd", "skew_reverse_kl")
    },
}  # fmt: skip


STACKS = {("divergence-skew_reverse_kl", 100): 8, ("draw_kernel", 80): 8}
"""Bytes of stack that a kernel takes on a GPU: ptxas of Triton 3.7 puts one address there, once per block of a row."""
ATTENTION_STACKS = {
    ("item_kernel", 80, "fp32", 64): 8, ("item_kernel", 90, "fp32", 64): 8, ("unit_kernel", 90, "fp32", 80): 24,
    ("unit_kernel", 100, "fp32", 256): 8, ("finish_kernel", 90, "fp32", 80): 96,
    ("finish_kernel", 100, "fp32", 128): 136,
}  # fmt: skip
"""Bytes of stack that attention kernels with window, softcap and sinks take, by GPU, dtype and width of a head. They
come from ptxas of Triton 3.7; Triton 3.9 compiles the same kernels without a stack."""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ROWWISE)
def test_rowwise_kernels(target: Target, name: str) -> None:
    kernel, pointers, constants, num_warps = ROWWISE[name]
    stack = STACKS.get((name, target.capability), 0)
    compiled = compile_for(target, kernel, types_of(**pointers), constants, stack, num_warps=num_warps)
    assert not name.startswith("scale") or "wide" in compiled.instructions, "memory is read in small pieces"


FILTERS = {
    "-".join(names): {name: name in names for name in ("TOP_K", "TOP_P", "MIN_P")}
    for names in (("TOP_K",), ("TOP_P",), ("MIN_P",), ("TOP_K", "TOP_P", "MIN_P"))
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["split_statistics_kernel", "list_kernel"])
def test_filters_passes_over_splits(target: Target, name: str) -> None:
    compile_filters(target, getattr(filter_lists_triton, name), {})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize(
    "kernel",
    [filter_lists_triton.bracket_kernel, filter_search_triton.select_kernel],
    ids=lambda kernel: kernel.__name__,
)
def test_filters(target: Target, filters: str, kernel: Any) -> None:
    compile_filters(target, kernel, FILTERS[filters])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("filters", ["TOP_K", "TOP_K-TOP_P-MIN_P"])
def test_search_that_judges(target: Target, filters: str) -> None:
    tiles = dataclasses.replace(filter_triton.SHIPPED, judged=True)
    compile_filters(target, filter_search_triton.select_kernel, FILTERS[filters], tiles)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("split", [8192, 16384])
@pytest.mark.parametrize("name", ["peaks_kernel", "draw_kernel", "judge_kernel", "take_kernel"])
def test_filters_that_judge(target: Target, name: str, split: int) -> None:
    warps, part = (8, 1024) if split == 8192 else (16, 2048)
    tiles = dataclasses.replace(filter_triton.SHIPPED, judged=True, split=split, split_warps=warps, part=part)
    filters = {"TOP_P": True, "MIN_P": True}
    compile_filters(target, getattr(filter_judge_triton, name), filters, tiles)


def compile_filters(
    target: Target,
    kernel: Any,
    filters: dict[str, bool],
    tiles: filter_triton.FilterTiles = filter_triton.SHIPPED,
) -> None:
    """Compile a kernel of the filters for a vocabulary of 151936, and check its loads."""
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
    stack = STACKS.get((kernel.__name__, target.capability), 0)
    compiled = compile_for(target, kernel, types, constants, stack, num_warps=num_warps)
    if "SPLIT" in constants and "logits" in kernel.arg_names:
        assert "wide" in compiled.instructions, "memory is read in small pieces"


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
def test_forward_kernels(target: Target, dtype: str, name: str) -> None:
    kernel, constants, num_warps = (FORWARD | VARIANTS)[name]
    pointers = dict.fromkeys(POINTERS, f"*{dtype}") | dict.fromkeys(("slot", "source", "destination", "expert"), "*i64")
    types = types_of(**pointers, cos="*fp32", sin="*fp32")
    compiled = compile_for(target, kernel, types, constants, num_warps=num_warps)
    assert "wide" in compiled.instructions, "memory is read in small pieces"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "gather"), [("bf16", True), ("fp32", False)])
def test_experts(target: Target, dtype: str, gather: bool) -> None:
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
        assert "wide" in compiled.instructions or loads_asynchronously(compiled, target)
        assert multiplies_by_matrix(compiled, target, dtype)


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
def test_attention_mass(target: Target, dtype: str, width: int, name: str) -> None:
    tiles = attention_mass_triton.choose_tiles(width, gradient=name in ("dq", "dk"))
    types = types_of(
        **dict.fromkeys(("q", "k", "dq", "dk"), f"*{dtype}"), **dict.fromkeys(INDEX, "*i32"),
        **dict.fromkeys(("lse", "row_mass", "d_mass", "unit", "delta"), "*fp32"),
    )  # fmt: skip
    options = attention_mass_triton.launch_options(width, tiles)
    num_warps, num_stages = options.pop("num_warps"), options.pop("num_stages")
    constants = {**options, "BLOCK_W": tiles.words} if name == "row_mass" else options
    compiled = compile_for(target, MASS[name], types, constants, num_warps=num_warps, num_stages=num_stages)
    assert target.matrix in compiled.instructions


@pytest.mark.parametrize("target", TARGETS)
def test_sums_over_steps(target: Target) -> None:
    types = types_of(row_mass="*fp32", order="*i32", step_start="*i32", mass="*fp32")
    constants = {"BLOCK_R": 32, "BLOCK_W": 64}
    compile_for(target, attention_mass_triton._sum_steps_kernel, types, constants)


def describe_attention(
    target: Target, kernel: str, dtype: str, width: int, extras: bool, *, joined: bool = False
) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int], AttentionTiles]:
    """Return one of attention's kernels as it ships: types and constants of its arguments, options and tiles.

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
    return function, types, constants, {"num_warps": num_warps, "num_stages": num_stages}, tiles


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
def test_attention(target: Target, dtype: str, width: int, extras: bool, kernel: str) -> None:
    function, types, constants, options, tiles = describe_attention(target, kernel, dtype, width, extras)
    stack = ATTENTION_STACKS.get((kernel, target.capability, dtype, width), 0) if extras else 0
    compiled = compile_for(target, function, types, constants, stack, **options)
    assert loads_asynchronously(compiled, target)
    assert "wide" in compiled.instructions  # of queries
    masked_tma = tiles.tail_tma if kernel == "finish_kernel" else tiles.window_tma
    if masked_tma or (tiles.tma and not extras):  # with a window every tile is masked
        assert "boxes" in compiled.instructions
    if dtype != "fp32":  # exact float32 products have no matrix instruction on NVIDIA's
        few = target.backend == "cuda" and tiles.block_m < 64  # rows, for the instruction of a warp group
        assert ("mma" if few else target.matrix) in compiled.instructions


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


@pytest.mark.parametrize("joined", [False, True])
def test_products_of_attention_go_on_under_the_softmax(joined: bool) -> None:
    (target,) = (parameter.values[0] for parameter in TARGETS if parameter.id == "sm_90")
    function, types, constants, options, _ = describe_attention(
        target, "item_kernel", "bf16", 128, False, joined=joined
    )  # fmt: skip
    kernel = compile_kernel(target, function, *describe_arguments(function, types, constants), **options)
    check_overlap(kernel.asm["ptx"])


@pytest.mark.parametrize("target", TARGETS)
def test_attention_over_chains_and_shared_parts(target: Target) -> None:
    for kernel in ("item_kernel", "finish_kernel") if target.arch == 90 else ("item_kernel",):
        function, types, constants, options, _ = describe_attention(target, kernel, "bf16", 128, False, joined=True)
        assert loads_asynchronously(compile_for(target, function, types, constants, **options), target)


@pytest.mark.parametrize("target", [target for target in TARGETS if target.id != "gfx942"])
def test_instructions_of_ptx_are_those_of_the_machine(target: Target) -> None:
    """PTX and machine code have the same instructions, and the record of these kernels says what the compiler gives."""
    for case in (("bf16", 128), ("fp32", 64)):
        function, types, constants, options, _ = describe_attention(target, "item_kernel", *case, True)
        arguments = describe_arguments(function, types, constants)
        kernel = compile_kernel(target, function, *arguments, **options)
        assert inspect_kernel(kernel, "cuda") == look_up(target, function, *arguments, **options)
        code = run_tool(kernel, "nvdisasm", "-c")
        for name, of_machine in MACHINE_CODE.items():
            written = re.search(INSTRUCTIONS["cuda"][name], kernel.asm["ptx"])
            assert bool(written) == bool(re.search(of_machine, code)), name
        if ("item_kernel", target.capability, *case) not in ATTENTION_STACKS:
            assert not re.search(r"\b(LDL|STL)\b", code), "registers are spilled"


def test_a_changed_kernel_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text under which a compilation is recorded has that of every function that the kernel calls."""
    kernel = draw_triton._draw_split_kernel
    texts = [source_of(kernel)]
    callees = [
        value
        for name, value in vars(draw_triton).items()
        if isinstance(value, triton.JITFunction) and name in kernel.src and value is not kernel
    ]
    assert callees
    for function in (kernel, *callees):
        source_of.cache_clear()
        monkeypatch.setattr(function, "_src", function.src + "\n    # changed")
        texts.append(source_of(kernel))
    source_of.cache_clear()
    assert len(set(texts)) == len(texts)
