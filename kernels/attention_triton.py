"""Triton kernels of `paged_attention`: two that read the cache, and one that merges and finishes.

A tile holds query vectors (rows times query heads per kv head) and walks tokens in tiles of BLOCK_T, whose borders are
multiples of BLOCK_T from the segment's first token. For every vector it keeps, with scores z in units of ln 2,

    peak = max z        total = sum 2^(z - peak)        values = sum 2^(z - peak) v

item_kernel     computes these partial results for items, which rows of several sequences can share
unit_kernel     computes rows of one sequence from first to last segment: prefill, and extension of a prefix
finish_kernel   computes the last segment of every other row where this row reads it alone, merges the row's partial
                results in the order of segments, and writes the output

All three (attention_kernels_triton.py) add up a tile by the same function and merge segments by the same function
(attention_sums_triton.py), in the order of segments. A tile of tokens that a vector does not see multiplies the
vector's sums by 1 and adds 0, no operation is atomic, and a row of a product depends on the same row of its factors
alone. So a vector's bits depend on its own keys and values, and on nothing else: neither on the kernel that computes
it, nor on its place in a tile.

The number of programs does not depend on the table, and the number of items is read from device memory, so a captured
graph serves every table that is copied into the same buffer.

Shapes:  N rows   P pages   S page size   H query heads   G kv heads   E head dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from genssd.kernels.attention_kernels_triton import finish_kernel, item_kernel, unit_kernel
from genssd.kernels.attention_launch_triton import AttentionLaunch
from genssd.kernels.device_table import ENTRY, ITEM, ROW, UNIT, DeviceTable

LOG2_E = 1.4426950408889634


def tile_descriptor(pages_PSGE: Tensor, block_t: int, block_e: int) -> TensorDescriptor | None:
    """Return a descriptor of tiles [block_t, block_e] of the pages, or None where the layout permits none.

    The pages must be contiguous in the order [P, G, S, E], and a page must hold complete tiles.
    """
    P, S, G, E = pages_PSGE.shape
    if S % block_t or not pages_PSGE.transpose(1, 2).is_contiguous() or E * pages_PSGE.element_size() % 16:
        return None
    if pages_PSGE.data_ptr() % 16 or block_e * pages_PSGE.element_size() < 16:
        return None
    return TensorDescriptor(pages_PSGE, [P * G * S, E], [E, 1], [block_t, block_e])


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
    pages of keys and values have the same strides and the entries of each head are contiguous, and unless scale and
    softcap are positive.
    """
    if k_pages_PSGE.stride() != v_pages_PSGE.stride() or k_pages_PSGE.stride(3) != 1:
        raise ValueError(
            "paged_attention: pages of keys and values must have the same strides, with contiguous heads; their "
            f"strides are {k_pages_PSGE.stride()} and {v_pages_PSGE.stride()}"
        )
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"paged_attention: scale and softcap must be positive, not {scale} and {softcap}")
    if q_NHE.stride(2) != 1:
        q_NHE = q_NHE.contiguous()
    out_NHE = torch.empty(q_NHE.shape, dtype=q_NHE.dtype, device=q_NHE.device)
    for call in plan_calls(
        q_NHE, k_pages_PSGE, v_pages_PSGE, table, scale, softcap, sinks_H, out_NHE=out_NHE, launch=launch
    ):
        call.run()
    return out_NHE


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCall:
    """A kernel with the number of its programs, its arguments, and its constants and options."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs,)](*self.arguments, **self.options)


def plan_calls(
    q_NHE: Tensor,
    k_pages_PSGE: Tensor,
    v_pages_PSGE: Tensor,
    table: DeviceTable,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    *,
    out_NHE: Tensor,
    launch: AttentionLaunch,
) -> list[KernelCall]:
    """Return the calls that compute `attend_rows` into out_NHE, in order."""
    N, H, E = q_NHE.shape
    if not N:
        return []
    G, tiles, capacity, device = k_pages_PSGE.shape[2], launch.tiles, table.capacity, q_NHE.device
    group, block_e = H // G, max(16, int(triton.next_power_of_2(E)))
    boxes = [tile_descriptor(x, tiles.block_t, block_e) if tiles.tma else None for x in (k_pages_PSGE, v_pages_PSGE)]
    tma = None not in boxes
    sources = (q_NHE, *(boxes if tma else (k_pages_PSGE, v_pages_PSGE)), k_pages_PSGE, v_pages_PSGE)
    # see add_scores
    inner = 1.0 if softcap is None else 2 * scale * LOG2_E / softcap
    factor = (scale if softcap is None else softcap) * LOG2_E
    _check_tiles(table, tiles.block_t)
    resumed = table.resume_tokens > 0
    numbers = (*q_NHE.stride()[:2], *k_pages_PSGE.stride()[:3], table.window, inner, factor)
    shared: dict[str, Any] = {
        "S": table.page_size, "E": E, "GROUP": group, "BLOCK_T": tiles.block_t, "BLOCK_E": block_e,
        "WINDOW": table.window > 0, "SOFTCAP": softcap is not None, "FUSED": tiles.fused, "TMA": tma,
        "MASKED_TMA": tma and (tiles.window_tma if table.window > 0 else tiles.masked_tma),
        "INTERPRET": launch.interpret,
    }  # fmt: skip
    sinks = q_NHE if sinks_H is None else sinks_H.contiguous()
    calls = []
    if capacity.units:
        flat = tiles.flat and table.shortest % tiles.block_t == 0
        strips = -(-capacity.unit_rows * group // tiles.unit_m)
        calls.append(
            KernelCall(
                kernel=unit_kernel, programs=tiles.unit_per_sm * launch.multiprocessors,
                arguments=(*sources, table.header, table.units, table.pages, sinks, out_NHE, G, strips, *numbers),
                options={
                    **shared, "BLOCK_M": tiles.unit_m, "SEGMENT": table.segment, "SHORTEST": table.shortest,
                    "FLAT": flat, "SINKS": sinks_H is not None, "UNIT": UNIT, "num_warps": tiles.unit_warps,
                    "num_stages": tiles.unit_stages,
                },
            )
        )  # fmt: skip
    peaks, totals = torch.empty(2, capacity.partials, H, dtype=torch.float32, device=device)
    partials = (peaks, totals, torch.empty(capacity.partials, H, E, dtype=torch.float32, device=device))
    if capacity.items:
        strips = -(-capacity.item_rows * group // tiles.block_m)
        parts = (table.header, table.items, table.entries, table.pages)
        calls.append(
            KernelCall(
                kernel=item_kernel, programs=tiles.per_sm * launch.multiprocessors,
                arguments=(*sources, *parts, *partials, G, strips, *numbers),
                options={
                    **shared, "BLOCK_M": tiles.block_m, "OVERLAP": tiles.overlap, "ITEM": ITEM, "ENTRY": ENTRY,
                    "CHAINED": table.chained, "RESUMED": resumed, "SEGMENT": table.segment,
                    "SHORTEST": table.shortest,
                    "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
                },
            )
        )  # fmt: skip
    if capacity.finishes:
        heads = min(tiles.tail_m, int(triton.next_power_of_2(group)))
        overlap = tiles.overlap and capacity.items > 0
        calls.append(
            KernelCall(
                kernel=finish_kernel, programs=N * G * -(-group // heads),
                arguments=(*sources, table.rows, table.pages, *partials, sinks, out_NHE, G, *numbers),
                options={
                    **shared, "MASKED_TMA": tma and tiles.tail_tma, "BLOCK_M": tiles.tail_m, "OVERLAP": overlap,
                    "RESUMED": resumed, "SINKS": sinks_H is not None, "ROW": ROW,
                    "HEADS": heads, "num_warps": tiles.tail_warps, "num_stages": tiles.tail_stages,
                    **({"launch_pdl": True} if overlap else {}),
                },
            )
        )  # fmt: skip
    return calls


def _check_tiles(table: DeviceTable, block_t: int) -> None:
    """Raise ValueError unless tiles of block_t tokens end where chained segments and shared parts do."""
    for length in (table.shortest if table.chained else 0, table.resume_tokens):
        if length % block_t:
            raise ValueError(
                f"paged_attention: tiles of {block_t} tokens do not end where the segment table has a boundary, after "
                f"{length} tokens"
            )
