"""Triton kernels of `paged_attention`: one over the segment table's items, and one that merges their results.

A program takes an item and a kv head, packs the query vectors of the item's rows (rows times query heads per kv head)
into the rows of one tile, and walks the item's tokens in tiles whose borders are multiples of BLOCK_T from the
segment's first token. For every vector it keeps, with scores z in units of ln 2,

    peak = max z        total = sum 2^(z - peak)        values = sum 2^(z - peak) v

Another kernel merges a row's partial results in the order of segments. Every tile has the same shape, whatever is
packed into it, every sum has the same order, and no operation is atomic; a tile of tokens that a vector does not see
multiplies the vector's sums by 1 and adds 0. So a vector's bits depend on its own keys and values alone.

Where sequences share no page, an item holds the rows of one sequence, and this is plain split attention. So one path
serves both cases, with the same bits: a table in which less is shared just has more items.

The number of programs does not depend on the table, and the number of items is read from device memory, so a captured
graph serves every table that is copied into the same buffer.

Shapes:  N rows   P pages   S page size   H query heads   G kv heads   E head dim   M vectors of a tile
         T tokens of a tile
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from genssd.kernels import tuned
from genssd.kernels.device_table import DeviceTable
from genssd.kernels.head_triton import safe_peak

LOG2_E = tl.constexpr(1.4426950408889634)
HEADS = 4  # heads of one row that a program merges


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTiles:
    """Sizes of one configuration of the kernel over items. block_m: query vectors of a tile. block_t: its tokens."""

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfiguration:
    """Launch configuration for any device of one kind, as a tune file keeps it; bits of results depend on it.

    segment: tokens of a segment (see `attention.choose_segment`). per_multiprocessor: number of programs.
    """

    tiles: AttentionTiles
    segment: int
    per_multiprocessor: int

    @staticmethod
    def from_values(values: tuned.Configuration) -> AttentionConfiguration:
        """Build from the values of a tune file. Raises ValueError where they are not those of `values`."""
        return tuned.build_from(AttentionConfiguration, values, {"tiles": AttentionTiles})

    def values(self) -> dict[str, int]:
        """Return the values of the tune file."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("tiles"), **fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLaunch:
    """Launch configuration of the kernel over items.

    programs: number of programs, on which no result depends. interpret: whether Triton's interpreter runs the kernel.
    """

    programs: int
    tiles: AttentionTiles
    interpret: bool = False


def choose_tiles(dtype: torch.dtype, head_dim: int, *, amd: bool, capability: int) -> AttentionTiles:
    """Return the shipped tile sizes. capability: NVIDIA's compute capability, 80 for sm_80; ignored on AMD."""
    wide = head_dim > 128
    if dtype == torch.float32:  # no matrix unit computes exact products, and larger tiles spill registers
        return AttentionTiles(block_m=16, block_t=16, num_warps=4, num_stages=2)
    if amd:  # 64 KiB of local memory
        return AttentionTiles(block_m=64, block_t=16 if wide else 32, num_warps=4, num_stages=2)
    if wide:
        return AttentionTiles(block_m=64, block_t=32, num_warps=8, num_stages=2 if capability < 90 else 3)
    # with 4 warps, the addresses of the pages spill registers everywhere but on Hopper
    return AttentionTiles(block_m=64, block_t=64, num_warps=4 if 90 <= capability < 100 else 8, num_stages=3)


def find_tuned(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> AttentionConfiguration | None:
    """Return the configuration that was tuned for a device, one for all numbers of rows; None where none was.

    shape: query heads, kv heads and head dim.
    """
    return tuned.find("attention", dtype, shape, device, 1, AttentionConfiguration.from_values)


def choose_configuration(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], segment: int
) -> AttentionConfiguration:
    """Return the configuration on a device: what was tuned for it, else the shipped one, with that segment length."""
    configuration = find_tuned(device, dtype, shape)
    if configuration is not None:
        return configuration
    properties = torch.cuda.get_device_properties(device)
    tiles = choose_tiles(
        dtype, shape[2], amd=torch.version.hip is not None, capability=10 * properties.major + properties.minor
    )
    # as many programs as the registers of all multiprocessors hold at once
    return AttentionConfiguration(tiles=tiles, segment=segment, per_multiprocessor=8 // tiles.num_warps)


def choose_launch(q_NHE: Tensor, kv_heads: int) -> AttentionLaunch:
    """Choose the launch configuration for the device, dtype and shape of the queries."""
    shape = (q_NHE.shape[1], kv_heads, q_NHE.shape[2])
    return make_launch(choose_configuration(q_NHE.device, q_NHE.dtype, shape, 1), q_NHE.device)


def make_launch(configuration: AttentionConfiguration, device: torch.device) -> AttentionLaunch:
    """Return the launch of a configuration on a device."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return AttentionLaunch(programs=configuration.per_multiprocessor * multiprocessors, tiles=configuration.tiles)


@triton.jit
def accumulate_product(a, b, c, INTERPRET: tl.constexpr):
    """Return c + a @ b, each row of which depends on the same row of a and c, and on b, alone."""
    # the interpreter would multiply the bits of bf16 as integers, and round a row differently at other places of a tile
    if INTERPRET:
        return c + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    return tl.dot(a, b, c, input_precision="ieee")


# strips depends on the batch, and code specialised on it might round differently
@triton.jit(do_not_specialize=("strips",))
def _item_kernel(
    q, k_pages, v_pages,  # [N, H, E] [P, S, G, E] [P, S, G, E]
    header, items, entries, pages, position,  # int32 [4] [items, 6] [entries, 2] [pages] [N]
    peaks, totals, values,  # [partials, H] [partials, H] [partials, H, E]
    G, strips, stride_n, stride_h, stride_page, stride_slot, stride_group, window, scale, softcap,
    S: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Compute the partial results of every item. strips: largest number of tiles that an item's query vectors fill."""
    H = G * GROUP
    m, t, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    for task in range(tl.program_id(0), tl.load(header) * G * strips, tl.num_programs(0)):
        kv_head = task // strips % G
        item = items + task // (G * strips) * 6
        item_pages, first = pages + tl.load(item), tl.load(item + 1)
        vector = task % strips * BLOCK_M + m
        valid = vector < tl.load(item + 4) * GROUP
        entry = entries + 2 * (tl.load(item + 3) + vector // GROUP)
        row = tl.load(entry, mask=valid, other=0)
        # each vector sees the segment's tokens after `before`, up to `last`
        at = tl.where(valid, tl.load(position + row, mask=valid, other=0) - first, -1)
        before = tl.where(valid, at - window, 1 << 30) if WINDOW else tl.full([BLOCK_M], -1, tl.int32)
        last = tl.minimum(at, tl.load(item + 2) - 1)
        low, high = tl.maximum(tl.min(before, 0) + 1, 0), tl.max(last, 0) + 1
        head = kv_head * GROUP + vector % GROUP
        of_q = valid[:, None] if E == BLOCK_E else valid[:, None] & (e[None, :] < E)
        at_q = row.to(tl.int64)[:, None] * stride_n + head[:, None] * stride_h + e[None, :]
        q_ME = tl.load(q + at_q, mask=of_q, other=0.0)
        peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        for start in range(low // BLOCK_T * BLOCK_T, high, BLOCK_T):
            token = start + t
            # a token that no vector sees may hold NaN: a token that one of them sees is read in its place
            read = tl.minimum(tl.maximum(token, low), high - 1)
            page = tl.load(item_pages + read // S).to(tl.int64)
            place = page * stride_page + (read % S) * stride_slot + kv_head * stride_group
            if E == BLOCK_E:
                k_ET = tl.load(k_pages + place[None, :] + e[:, None])
                v_TE = tl.load(v_pages + place[:, None] + e[None, :])
            else:
                k_ET = tl.load(k_pages + place[None, :] + e[:, None], mask=e[:, None] < E, other=0.0)
                v_TE = tl.load(v_pages + place[:, None] + e[None, :], mask=e[None, :] < E, other=0.0)
            z = accumulate_product(q_ME, k_ET, tl.zeros([BLOCK_M, BLOCK_T], tl.float32), INTERPRET) * scale
            if SOFTCAP:
                z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
            visible = token[None, :] <= last[:, None]
            if WINDOW:
                visible &= token[None, :] > before[:, None]
            z = tl.where(visible, z * LOG2_E, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(z, 1))
            base = safe_peak(new_peak)
            shrink, weight = tl.exp2(peak - base), tl.exp2(z - base[:, None])
            total = total * shrink + tl.sum(weight, 1)
            sums_ME = accumulate_product(weight.to(v_TE.dtype), v_TE, sums_ME * shrink[:, None], INTERPRET)
            peak = new_peak
        partial = tl.load(entry + 1, mask=valid, other=0).to(tl.int64) * H + head
        tl.store(peaks + partial, peak, mask=valid)
        tl.store(totals + partial, total, mask=valid)
        tl.store(values + partial[:, None] * E + e[None, :], sums_ME, mask=of_q)


@triton.jit
def _merge_kernel(
    peaks, totals, values,  # [partials, H] [partials, H] [partials, H, E]
    row_partial, sinks, out,  # int32 [N + 1] [H] [N, H, E]
    H,
    E: tl.constexpr, HEADS: tl.constexpr, BLOCK_E: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of HEADS heads of one row in the order of segments."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    e = tl.arange(0, BLOCK_E)[None, :]
    valid = head < H
    valid_entries = valid[:, None] & (e < E)
    peak = tl.full([HEADS], -float("inf"), tl.float32)
    if SINKS:
        peak = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * LOG2_E
    total = tl.where(peak > -float("inf"), 1.0, 0.0)
    sums = tl.zeros([HEADS, BLOCK_E], tl.float32)
    for partial in range(tl.load(row_partial + row), tl.load(row_partial + row + 1)):
        at = tl.cast(partial, tl.int64) * H + head
        partial_peak = tl.load(peaks + at, mask=valid, other=0.0)
        new_peak = tl.maximum(peak, partial_peak)
        base = safe_peak(new_peak)  # for two empty sets -inf - -inf would be NaN
        a, b = tl.exp2(peak - base), tl.exp2(partial_peak - base)
        total = total * a + tl.load(totals + at, mask=valid, other=0.0) * b
        partial_sums = tl.load(values + at[:, None] * E + e, mask=valid_entries, other=0.0)
        sums = sums * a[:, None] + partial_sums * b[:, None]
        peak = new_peak
    merged = sums / tl.where(total == 0.0, 1.0, total)[:, None]  # zeros where no position was seen
    tl.store(out + (row * H + head)[:, None] * E + e, merged.to(out.dtype.element_ty), mask=valid_entries)


def choose_merge_tiling(head_dim: int) -> tuple[int, int]:
    """Return how many entries of a head a merging program holds, and its number of warps."""
    block = int(triton.next_power_of_2(head_dim))
    return block, max(1, HEADS * block // 256)


def attend_rows(
    q_NHE: Tensor,
    k_pages_PSGE: Tensor,
    v_pages_PSGE: Tensor,
    table: DeviceTable,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    *,
    launch: AttentionLaunch,
) -> Tensor:
    """Compute `attention.paged_attention` on a CUDA device.

    Rows and heads of q, and pages, slots and heads of the cache, may have any stride. Raises ValueError unless the
    pages of keys and values have the same strides and the entries of each head are contiguous.
    """
    N, H, E = q_NHE.shape
    G, tiles = k_pages_PSGE.shape[2], launch.tiles
    if k_pages_PSGE.stride() != v_pages_PSGE.stride() or k_pages_PSGE.stride(3) != 1:
        raise ValueError(
            "paged_attention: pages of keys and values must have the same strides, with contiguous heads; their "
            f"strides are {k_pages_PSGE.stride()} and {v_pages_PSGE.stride()}"
        )
    if q_NHE.stride(2) != 1:
        q_NHE = q_NHE.contiguous()
    partials = table.capacity.partials
    peaks, totals = torch.empty(2, partials, H, dtype=torch.float32, device=q_NHE.device)
    values = torch.empty(partials, H, E, dtype=torch.float32, device=q_NHE.device)
    out_NHE = torch.empty(N, H, E, dtype=q_NHE.dtype, device=q_NHE.device)
    if not N:
        return out_NHE
    _item_kernel[(launch.programs,)](
        q_NHE, k_pages_PSGE, v_pages_PSGE, table.header, table.items, table.entries, table.pages, table.position,
        peaks, totals, values,
        G, -(-table.capacity.item_rows * (H // G) // tiles.block_m), *q_NHE.stride()[:2], *k_pages_PSGE.stride()[:3],
        table.window, scale, softcap or 1.0,
        S=table.page_size, E=E, GROUP=H // G, BLOCK_M=tiles.block_m, BLOCK_T=tiles.block_t,
        BLOCK_E=max(16, triton.next_power_of_2(E)), WINDOW=table.window > 0, SOFTCAP=softcap is not None,
        INTERPRET=launch.interpret, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    block, num_warps = choose_merge_tiling(E)
    _merge_kernel[(N, -(-H // HEADS))](
        peaks, totals, values, table.row_partial, peaks if sinks_H is None else sinks_H.contiguous(), out_NHE, H,
        E=E, HEADS=HEADS, BLOCK_E=block, SINKS=sinks_H is not None, num_warps=num_warps,
    )  # fmt: skip
    return out_NHE
