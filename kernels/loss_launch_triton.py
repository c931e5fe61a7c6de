"""Launch configurations of the losses under a head on a CUDA device, as a tune file keeps them.

Shapes:  C rows of a chunk   V vocabulary   D model width
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from genssd.kernels import head_triton, tune_file, tuned
from genssd.kernels.divergence_triton import TILES
from genssd.kernels.head import ChunkLogits, Multiply, multiply_into
from genssd.kernels.head_triton import HeadConfiguration, HeadTiles, fits_descriptor, make_launch
from genssd.kernels.loss_logits_triton import write_normalized_logits
from genssd.kernels.rows_triton import EVERY_ROW, ROWS, RowTiles

UNLIMITED = 1 << 30
"""Rows of a chunk: as many as the memory of a loss holds."""
MANY = 8192
"""Number of rows whose tiles of the product a loss takes, whatever its own number is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfiguration:
    """How a loss and its gradients are computed. All of it may decide the last bits of both.

    fused: whether a kernel of ours writes the logits and takes the normalizers of the softmax from its registers,
    rather than the library's product, whose logits the pass over rows reads once more; the library's remains where
    the tiles cannot be read from the layout of a matrix. tiles, splits, group and
    per_multiprocessor: configuration of that kernel; see HeadConfiguration. block_entries, row_warps and programs:
    sizes of the pass over rows; see RowTiles. chunk_rows: largest number of rows whose logits are held at once; the
    memory of a loss bounds it too.
    """

    tiles: HeadTiles
    splits: int = 132
    group: int = 16
    per_multiprocessor: int = 1
    fused: bool = False
    block_entries: int
    row_warps: int
    programs: int = EVERY_ROW
    chunk_rows: int = UNLIMITED

    @staticmethod
    def from_values(values: tune_file.Configuration) -> LossConfiguration:
        """Build from the values of a tune file. Raises ValueError where they are not those of `values`."""
        return tuned.build_from(LossConfiguration, values, {"tiles": HeadTiles})

    def values(self) -> dict[str, int]:
        """Return the values of the tune file."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("tiles"), **fields}

    @property
    def rows(self) -> RowTiles:
        """Sizes of the pass over rows."""
        return RowTiles(block=self.block_entries, num_warps=self.row_warps, programs=self.programs)

    def make_multiply(self, temperature: float, softcap: float | None) -> Multiply:
        """Return the function that writes the logits of a chunk of rows."""

        def multiply(hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor) -> ChunkLogits:
            if not (self.fused and self._reads(hidden_CD) and self._reads(weight_VD)):
                return ChunkLogits(multiply_into(hidden_CD, weight_VD, out=out_CV))
            product = HeadConfiguration(
                tiles=self.tiles, splits=self.splits, group=self.group, per_multiprocessor=self.per_multiprocessor
            )
            launch = make_launch(product, hidden_CD, weight_VD)
            normalizer = write_normalized_logits(hidden_CD, weight_VD, out_CV, temperature, softcap, launch=launch)
            return ChunkLogits(out_CV, normalizer)

        return multiply

    def _reads(self, x: Tensor) -> bool:
        """Return whether the tiles of the fused product can be read from a matrix."""
        return fits_descriptor(x) if self.tiles.descriptors else x.stride(1) == 1


def choose_shipped(
    operator: tune_file.Operator, dtype: torch.dtype, *, amd: bool, capability: int
) -> LossConfiguration:
    """Return the shipped configuration of "cross_entropy" or "divergence": the library's product, a program per row.

    capability: NVIDIA's compute capability, 80 for sm_80; ignored on AMD.
    """
    rows = TILES if operator == "divergence" else ROWS
    product = head_triton.choose_shipped("logits", dtype, MANY, amd=amd, capability=capability)
    return LossConfiguration(tiles=product.tiles, block_entries=rows.block, row_warps=rows.num_warps)


def choose_configuration(
    operator: tune_file.Operator, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> LossConfiguration:
    """Return the configuration of a loss on a device: what was tuned for it, else the shipped one.

    shape: vocabulary and model width of "cross_entropy"; smaller vocabulary and widths of student and teacher of
    "divergence".
    """
    configuration = tuned.find(operator, dtype, shape, device, MANY, LossConfiguration.from_values)
    if configuration is not None:
        return configuration
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return choose_shipped(operator, dtype, amd=torch.version.hip is not None, capability=capability)
