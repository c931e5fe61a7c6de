"""Launch configurations of the kernels of `paged_attention`: what they are, which ship, and which were tuned."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from genssd.kernels import tune_file, tuned
from genssd.kernels.device_table import TableOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTiles:
    """Sizes of one configuration of the kernels, on some of which the bits of results depend; see `choose_tiles`.

    block_t: tokens of a tile. block_m, unit_m, tail_m: query vectors of a tile of the kernel over items, over units and
    over rows. per_sm, unit_per_sm: programs per multiprocessor. tma: whether tiles of keys and values are loaded by the
    tensor memory accelerator, where the layout of the pages permits it; masked_tma, window_tma and tail_tma: so, too,
    where not every vector sees every token of the tile, without a window, with one, and in the kernel over rows.
    overlap: whether the kernel over rows starts while that over items runs, which needs
    Hopper or later. fused: whether score and peak are subtracted in the rounding of the multiplication by the scale.
    flat: whether the tiles of all segments of a unit are in one loop, so that no load waits at the end of a segment.
    chained: whether a program of the kernel over items reads several segments of the same rows, where that keeps the
    programs equally busy. resumed: whether what rows hold in the same pages of their unfinished segments is computed
    once, and every row goes on from there. Neither changes a bit of a result.
    """

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int
    tail_m: int
    tail_warps: int
    tail_stages: int = 2
    unit_m: int
    unit_warps: int
    unit_stages: int
    per_sm: int = 1
    unit_per_sm: int = 1
    tma: bool = False
    masked_tma: bool = False
    window_tma: bool = False
    tail_tma: bool = False
    overlap: bool = False
    fused: bool = True
    flat: bool = True
    chained: bool = False
    resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfiguration:
    """Launch configuration for any device of one kind, as a tune file keeps it; bits of results depend on it.

    segment: tokens of a segment (see `device_table.TableOptions`).
    """

    tiles: AttentionTiles
    segment: int

    @staticmethod
    def from_values(values: tune_file.Configuration) -> AttentionConfiguration:
        """Build from the values of a tune file. Raises ValueError where they are not those of `values`."""
        return tuned.build_from(AttentionConfiguration, values, {"tiles": AttentionTiles})

    def table_options(self, multiprocessors: int, kv_heads: int) -> TableOptions:
        """Return what the segment tables of a model are made with."""
        tiles = self.tiles
        programs = max(1, tiles.per_sm * multiprocessors // kv_heads)
        return TableOptions(
            segment=self.segment,
            chain_programs=programs if tiles.chained else 0,
            resume_tokens=tiles.block_t if tiles.resumed else 0,
        )

    def values(self) -> dict[str, int]:
        """Return the values of the tune file."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("tiles"), **fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLaunch:
    """Launch configuration of the kernels.

    multiprocessors: of the device; no result depends on it. interpret: whether Triton's interpreter runs the kernels.
    """

    multiprocessors: int
    tiles: AttentionTiles
    interpret: bool = False


def choose_tiles(dtype: torch.dtype, head_dim: int, *, amd: bool, capability: int) -> AttentionTiles:
    """Return the shipped tile sizes. capability: NVIDIA's compute capability, 80 for sm_80; ignored on AMD.

    The three kernels multiply by the same instruction, with the same tokens of a tile, and add up a row's weights in
    the same order, or a row would have other bits in each of them.
    """
    hopper = 90 <= capability < 100
    if dtype == torch.float32:  # no matrix unit computes exact products; found by trial, to spill no registers
        block_t = 32 if 64 < head_dim <= 128 and not amd else 16
        stages = 3 if head_dim > 128 and not amd else 2
        tiles = equal_tiles(block_m=16, block_t=block_t, num_warps=4, num_stages=stages, per_sm=2)
        return dataclasses.replace(tiles, num_stages=3) if head_dim <= 64 and not amd else tiles
    if amd:  # 64 KiB of local memory
        return equal_tiles(block_m=64, block_t=16 if head_dim > 128 else 32, num_warps=4, per_sm=2)
    if head_dim > 128:  # larger tiles spill registers
        tiles = equal_tiles(block_m=64 if hopper else 32, block_t=32, num_warps=8, tma=capability >= 90)
        if hopper:
            return dataclasses.replace(tiles, masked_tma=False, window_tma=False)
        return dataclasses.replace(tiles, num_stages=3)
    if not hopper:
        return equal_tiles(block_m=64, block_t=64, num_warps=8, tma=capability >= 90)
    # every warp holds 16 vectors, whatever the size of the tile
    return AttentionTiles(
        block_m=128, block_t=64, num_warps=8, num_stages=3, tail_m=64, tail_warps=4, tail_stages=1,
        unit_m=128, unit_warps=8, unit_stages=3, tma=True, window_tma=True, tail_tma=True, overlap=True,
    )  # fmt: skip


def equal_tiles(
    *, block_m: int, block_t: int, num_warps: int, per_sm: int = 1, tma: bool = False, num_stages: int = 2
) -> AttentionTiles:
    """Return tile sizes that are the same for all kernels."""
    return AttentionTiles(
        block_m=block_m, block_t=block_t, num_warps=num_warps, num_stages=num_stages, tail_m=block_m,
        tail_warps=num_warps, tail_stages=num_stages, unit_m=block_m, unit_warps=num_warps, unit_stages=num_stages,
        per_sm=per_sm, unit_per_sm=per_sm, tma=tma, masked_tma=tma, window_tma=tma, tail_tma=tma,
    )  # fmt: skip


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
    return AttentionConfiguration(tiles=tiles, segment=segment)


def choose_launch(q_NHE: Tensor, kv_heads: int) -> AttentionLaunch:
    """Choose the launch configuration for the device, dtype and shape of the queries."""
    shape = (q_NHE.shape[1], kv_heads, q_NHE.shape[2])
    return make_launch(choose_configuration(q_NHE.device, q_NHE.dtype, shape, 1), q_NHE.device)


def make_launch(configuration: AttentionConfiguration, device: torch.device) -> AttentionLaunch:
    """Return the launch of a configuration on a device."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return AttentionLaunch(multiprocessors=multiprocessors, tiles=configuration.tiles)
