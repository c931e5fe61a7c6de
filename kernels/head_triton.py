"""Triton functions for a linear head: tiles of its logits. Passes over stored logits are in rows_triton.py.

Shapes:  N rows   V vocabulary   D model width
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from genssd.kernels import tune_file, tuned


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTiles:
    """Sizes of one configuration of a kernel over tiles of the head's logits.

    block_n: rows of a tile. block_v: its vocabulary entries. block_d: entries of the model width multiplied at a time.
    descriptors: whether tiles are loaded by tensor descriptors (the tensor memory accelerator of Hopper and later)
    rather than through pointers.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfiguration:
    """Launch configuration of a kernel over the head for any device of one kind, as a tune file keeps it.

    splits: number of parts of the vocabulary that are summed up on their own; results depend on it, on block_v and on
    library in their last bits. group: number of blocks of rows that walk the vocabulary at the same time.
    per_multiprocessor: number of programs. library: whether the library's product writes logits that another kernel
    reads, in place of a kernel that multiplies tiles itself; a row's bits then depend on the number of rows.
    """

    tiles: HeadTiles
    splits: int = 132
    group: int = 16
    per_multiprocessor: int = 1
    library: bool = False

    @staticmethod
    def from_values(values: tune_file.Configuration) -> HeadConfiguration:
        """Build from the values of a tune file. Raises ValueError where they are not those of `values`."""
        return tuned.build_from(HeadConfiguration, values, {"tiles": HeadTiles})

    def values(self) -> dict[str, int]:
        """Return the values of the tune file."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("tiles"), **fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLaunch:
    """Launch configuration of a kernel over the head.

    programs: number of programs, and group: number of blocks of rows that walk the vocabulary at the same time; no
    result depends on them. splits: number of parts of the vocabulary that are summed up on their own; results depend on
    it in their last bits. library: whether the library's product writes the logits. interpret: whether Triton's
    interpreter runs the kernel.
    """

    programs: int
    tiles: HeadTiles
    splits: int = 132
    group: int = 16
    library: bool = False
    interpret: bool = False

    def divide(self, vocabulary: int) -> tuple[int, int]:
        """Return the number of splits and of tiles per split, which do not depend on the number of rows."""
        tiles = -(-vocabulary // self.tiles.block_v)
        per_split = -(-tiles // self.splits)
        return -(-tiles // per_split), per_split


# all sum over the same tiles of the vocabulary, so that a row has the same bits in each
HOPPER_FEW = HeadTiles(block_n=64, block_v=256, block_d=64, num_warps=4, num_stages=5, descriptors=True)
HOPPER_SOME = HeadTiles(block_n=128, block_v=256, block_d=64, num_warps=8, num_stages=4, descriptors=True)
HOPPER_MANY = dataclasses.replace(HOPPER_SOME, num_stages=3)
HOPPER_TALL = HeadTiles(block_n=256, block_v=128, block_d=64, num_warps=8, num_stages=4, descriptors=True)
AMPERE = HeadTiles(block_n=128, block_v=128, block_d=32, num_warps=8, num_stages=4)  # block_d 64 spills registers
AMD = HeadTiles(block_n=128, block_v=128, block_d=32, num_warps=8, num_stages=2)  # 64 KiB of local memory
# no matrix unit computes float32, and larger tiles spill
SINGLE = HeadTiles(block_n=32, block_v=32, block_d=32, num_warps=8, num_stages=3)


def choose_shipped(
    operator: tune_file.Operator,
    dtype: torch.dtype,
    rows: int,
    *,
    amd: bool,
    capability: int,
    deterministic: bool = True,
) -> HeadConfiguration:
    """Return the shipped configuration of "score" or "logits" for a number of rows.

    capability: NVIDIA's compute capability, 80 for sm_80; ignored on AMD. deterministic: all numbers of rows get
    configurations with which a row has the same bits. Hopper's were the fastest on an H200 at widths of 1024 and 4096.
    """
    if dtype == torch.float32:
        return HeadConfiguration(tiles=SINGLE, per_multiprocessor=2)
    if amd:
        return HeadConfiguration(tiles=AMD)
    if capability < 90:
        return HeadConfiguration(tiles=AMPERE)
    of_class = [HOPPER_FEW, HOPPER_SOME, HOPPER_SOME, HOPPER_MANY]
    if operator == "score" and not deterministic and capability < 100:  # without descriptors it spills on sm_100
        of_class[2] = HOPPER_TALL
    return HeadConfiguration(tiles=of_class[tune_file.row_class(rows)])


def choose_configuration(
    operator: tune_file.Operator, device: torch.device, dtype: torch.dtype, shape: tuple[int, int], rows: int
) -> HeadConfiguration:
    """Return the configuration of "score" or "logits" on a device: what was tuned for it, else the shipped one.

    shape: vocabulary and model width of the head.
    """
    configuration = tuned.find(operator, dtype, shape, device, rows, HeadConfiguration.from_values)
    if configuration is not None:
        return configuration
    properties = torch.cuda.get_device_properties(device)
    return choose_shipped(
        operator, dtype, rows, amd=torch.version.hip is not None,
        capability=10 * properties.major + properties.minor, deterministic=tuned.is_deterministic(),
    )  # fmt: skip


def choose_launch(hidden: Tensor, weight: Tensor, operator: tune_file.Operator) -> HeadLaunch:
    """Choose the launch configuration for the device, dtype, shape and layout of the hidden states and the weight."""
    shape = (len(weight), weight.shape[1])
    return make_launch(choose_configuration(operator, hidden.device, hidden.dtype, shape, len(hidden)), hidden, weight)


def make_launch(configuration: HeadConfiguration, hidden: Tensor, weight: Tensor) -> HeadLaunch:
    """Return the launch of a configuration; without descriptors where they do not fit the layout of a matrix."""
    tiles = configuration.tiles
    if tiles.descriptors and not (fits_descriptor(hidden) and fits_descriptor(weight)):
        tiles = dataclasses.replace(tiles, descriptors=False)
    multiprocessors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    return HeadLaunch(
        programs=configuration.per_multiprocessor * multiprocessors, tiles=tiles, splits=configuration.splits,
        group=configuration.group, library=configuration.library,
    )  # fmt: skip


def multiply_by_library(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return hidden @ weight.T in float32, without rounding to a narrower dtype of the inputs."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def fits_descriptor(x: Tensor) -> bool:
    """Return whether a tensor descriptor can describe a matrix: it begins, and its rows begin, at 16 bytes."""
    return x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def describe(x: Tensor, rows: int, tiles: HeadTiles) -> Any:
    """Return what a kernel takes for a matrix: a descriptor of tiles [rows, block_d], or the matrix itself."""
    if not tiles.descriptors:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, tiles.block_d])


@triton.jit
def load_tile(
    x, first, start, N, D, stride,  # a descriptor, or a pointer to [N, D]
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Return the tile [BLOCK, BLOCK_D] of x that begins at row `first` and column `start`.

    Columns beyond the last one are 0. Rows beyond the last one are 0 or repeat it.
    """
    if DESCRIPTORS:
        return x.load([first, start])
    else:
        n = tl.minimum(first + tl.arange(0, BLOCK), N - 1).to(tl.int64)
        d = start + tl.arange(0, BLOCK_D)
        return tl.load(x + n[:, None] * stride + d[None, :], mask=d[None, :] < D, other=0.0)


@triton.jit
def add_product(x, a, b, INTERPRET: tl.constexpr):
    """Return x + a @ b, each entry of which is summed in the order of the shared dimension."""
    # the interpreter would multiply the bits of bf16 as integers, and round differently at other places of a tile
    if INTERPRET:
        return x + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    return tl.dot(a, b, x, input_precision="ieee")


@triton.jit
def multiply_tile(
    hidden, weight, n_first, v_first, N, V, D, stride_n, stride_v,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIPTORS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return the products x of BLOCK_N rows from n_first with BLOCK_V vocabulary entries from v_first, in float32.

    Every product is summed in the order of D with the same instruction, whatever the sizes of the tile.
    """
    x = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        h = load_tile(hidden, n_first, start, N, D, stride_n, BLOCK_N, BLOCK_D, DESCRIPTORS)
        w = load_tile(weight, v_first, start, V, D, stride_v, BLOCK_V, BLOCK_D, DESCRIPTORS)
        x = add_product(x, h, w.T, INTERPRET)
    return x


@triton.jit
def place_of(task, blocks, splits, group):
    """Return the split and the block of rows of a task.

    `group` blocks of rows walk the vocabulary together, so that their hidden states and the weights of the current
    splits stay in the L2 cache.
    """
    group_tasks = group * splits
    first = task // group_tasks * group
    size = tl.minimum(group, blocks - first)
    within = task % group_tasks
    return within // size, first + within % size


@triton.jit
def finish_logits(
    x, bias, v_first, V, temperature, softcap,
    BLOCK_V: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Return the logits z of the products x; entries beyond the vocabulary are -inf. SCALED: temperature is not 1."""
    v = v_first + tl.arange(0, BLOCK_V)
    if HAS_BIAS:
        x += tl.load(bias + tl.minimum(v, V - 1)).to(tl.float32)[None, :]
    if SOFTCAP:
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    if SCALED:
        x = x / temperature
    if v_first + BLOCK_V > V:
        x = tl.where(v[None, :] < V, x, -float("inf"))
    return x


@triton.jit
def squash(x, temperature, softcap, SOFTCAP: tl.constexpr):
    """Return the logits z of the products x: capped by softcap, then divided by temperature; see head.py."""
    if SOFTCAP:
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return x / temperature


@triton.jit
def safe_peak(peak):
    """Return the value to subtract before exponentiating: the peak, or 0 for -inf, where differences would be NaN."""
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def rescale(old_peak, base):
    """Return e^(old_peak - base), the factor of sums relative to old_peak; 0 for an old peak of -inf (empty sums)."""
    return tl.where(old_peak == -float("inf"), 0.0, tl.exp(tl.where(old_peak == -float("inf"), 0.0, old_peak - base)))
