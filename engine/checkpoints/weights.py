"""The weight files of a Hugging Face model directory and the tensors in them. Only safetensors are read.

The files are those that transformers reads: model.safetensors, else the shards of model.safetensors.index.json. What
would be read otherwise, or twice, or not at all, is refused, so that every reader of a directory has the same tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genssd.engine.checkpoints.config_files import read_fields, refuse_pointer
from genssd.engine.checkpoints.model_names import GGUF_STEP
from genssd.engine.checkpoints.mxfp4 import BLOCK, dequantize
from genssd.engine.common.errors import CheckpointError
from genssd.engine.common.quoting import one_line, quote

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_NAME = 255
"""Maximum number of bytes in the name of a file, on the file systems in use."""
DTYPES = ("F32", "F16", "BF16")
"""Data types of weights that are read, by their names in safetensors."""
MXFP4 = "MXFP4"
"""Name of the data type of a tensor that is stored as NAME_blocks and NAME_scales (mxfp4.py)."""
BLOCKS, SCALES = "_blocks", "_scales"
UNUSED = re.compile(
    r"rotary_emb\.inv_freq$|(^|\.)position_ids$|\.attn\.(masked_)?bias$"
    r"|(^|\.)mtp(_|\.)|(^|\.)(visual|vision\w*|image\w*|audio\w*|multi_modal_projector|mm_projector)\."
)
"""Names of tensors that a language model does without: buffers of older versions, multi-token prediction, encoders."""
DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
"""Names of the weight files of torch's distributed checkpoints, which transformers reads before all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Place, data type and shape of a tensor in a weight file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    scales: StoredTensor | None = None
    """Place of the scales of blocks in MXFP4; `file` is that of the blocks."""

    @property
    def num_elements(self) -> int:
        """Number of values in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The tensors of a checkpoint by name, as the headers of its weight files list them."""

    directory: Path
    tensors: Mapping[str, StoredTensor]

    @staticmethod
    def open(directory: Path) -> WeightFiles:
        """Read the headers of the weight files.

        Raises CheckpointError naming the file and the tensor where a file is missing or broken, and where a tensor is
        in two shards, in a shard that the index does not name for it, or missing from the one that the index names.
        """
        index = _read_index(directory)
        tensors: dict[str, StoredTensor] = {}
        for file in weight_files(directory):
            for name, stored in _read_header(file).items():
                owner = file if index is None else directory / index.get(name, "")
                if owner == file:
                    tensors[name] = stored
                elif index is not None and name in index:
                    raise CheckpointError(f"{file} has the tensor {name} a second time: {INDEX} names {owner.name}")
                elif not UNUSED.search(name):
                    raise CheckpointError(
                        f"{file} has a tensor {name} that {INDEX} does not name: write the index anew"
                    )
        lost = sorted(set(index or ()) - set(tensors))
        if index and lost:
            raise CheckpointError(
                f"{directory / index[lost[0]]} has no tensor {lost[0]}, although {INDEX} names it there"
            )
        return WeightFiles(directory=directory, tensors=_join_mxfp4(tensors))

    def check_dtype(self, name: str) -> None:
        """Check that a tensor holds plain floating-point weights. Raises CheckpointError naming file and tensor."""
        stored = self.tensors[name]
        if stored.dtype not in (*DTYPES, MXFP4):
            raise CheckpointError(
                f"{stored.file}: {name} has the data type {stored.dtype}; weights must be {', '.join(DTYPES)}: "
                "use the checkpoint before quantization or conversion"
            )

    @contextmanager
    def reading(
        self, names: Mapping[str, str], dtype: torch.dtype, device: torch.device
    ) -> Iterator[Mapping[str, Tensor]]:
        """Give tensors by new names while the block runs. Each is read when it is looked up, and converted to dtype.

        So only what the reader keeps takes memory. names: the name in the files by the new one. A lookup raises
        CheckpointError where the file cannot be read.
        """
        with ExitStack() as stack:
            yield _LazyTensors(self.tensors, names, dtype, device, stack)


def read_tensors(directory: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, sharded or not. Raises CheckpointError naming the file at fault."""
    weights = WeightFiles.open(directory)
    with weights.reading({name: name for name in weights.tensors}, dtype, device) as tensors:
        return dict(tensors)


class _LazyTensors(Mapping[str, Tensor]):
    """Tensors of weight files that stay open, each read at every lookup."""

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        names: Mapping[str, str],
        dtype: torch.dtype,
        device: torch.device,
        stack: ExitStack,
    ) -> None:
        self._stored = stored
        self._names = names
        self._dtype = dtype
        self._device = device
        self._stack = stack
        self._files: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        stored_name = self._names[name]
        stored = self._stored[stored_name]
        if stored.scales is None:
            return self._read(stored.file, stored_name).to(self._dtype)
        blocks = self._read(stored.file, f"{stored_name}{BLOCKS}")
        scales = self._read(stored.scales.file, f"{stored_name}{SCALES}")
        return dequantize(blocks, scales, self._dtype).transpose(1, 2)

    def _read(self, file: Path, stored_name: str) -> Tensor:
        try:
            if file not in self._files:
                self._files[file] = self._stack.enter_context(safe_open(file, framework="pt", device=str(self._device)))
            tensor: Tensor = self._files[file].get_tensor(stored_name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {one_line(error)}") from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading it


def _join_mxfp4(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors with one in place of each pair of blocks [X, M, B, 16] and scales [X, M, B].

    Its shape is that of the same weight in a checkpoint without MXFP4, [X, inputs, outputs].
    """
    joined = dict(tensors)
    for name, blocks in tensors.items():
        own = name.removesuffix(BLOCKS)
        scales = tensors.get(f"{own}{SCALES}")
        if own == name or scales is None or blocks.dtype != scales.dtype or blocks.dtype != "U8":
            continue
        if len(scales.shape) == 3 and blocks.shape == (*scales.shape, BLOCK // 2):
            experts, outputs, count = scales.shape
            del joined[name], joined[f"{own}{SCALES}"]
            shape = (experts, count * BLOCK, outputs)
            joined[own] = StoredTensor(file=blocks.file, dtype=MXFP4, shape=shape, scales=scales)
    return joined


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in order. Raises CheckpointError where they are missing."""
    _refuse_other_formats(directory)
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    index = _read_index(directory)
    if index is None:
        raise CheckpointError(f"{directory} has no safetensors weights{_hint(directory)}")
    files = [directory / name for name in sorted(set(index.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(f"{directory}: weight files named by {INDEX} are missing: {', '.join(missing)}")
    return files


def _read_index(directory: Path) -> Mapping[str, str] | None:
    """Return the file name of each tensor by the index; None where model.safetensors or nothing is there."""
    path = directory / INDEX
    if (directory / SINGLE).is_file() or not path.is_file():
        return None
    fields = read_fields(path)
    shards = fields.get("weight_map")
    if not isinstance(shards, Mapping) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{path} is no safetensors index: its weight_map must name a file for each tensor")
    if not isinstance(fields.get("metadata"), Mapping):
        raise CheckpointError(f'{path} has no field metadata, which transformers reads: add "metadata": {{}}')
    for name, shard in shards.items():
        place = PurePosixPath(shard)
        is_name = (
            shard.endswith(".safetensors") and "\0" not in shard and len(shard.encode(errors="replace")) <= MAX_NAME
        )
        if place.is_absolute() or ".." in place.parts or not is_name:
            raise CheckpointError(
                f"{path} places {quote(name)} in {quote(shard)}, which is no safetensors file of this directory"
            )
    return {str(name): str(PurePosixPath(shard)) for name, shard in shards.items()}


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors that a safetensors file lists."""
    refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as shard:  # checks the header against the size of the file
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - no mapping
            tensors = {
                name: StoredTensor(file=file, dtype=str(part.get_dtype()), shape=tuple(part.get_shape()))
                for name, part in slices.items()
            }
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        names = json.loads(header, object_pairs_hook=lambda pairs: [name for name, _ in pairs])
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {one_line(error)}") from None
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise CheckpointError(f"{file} has the tensor {repeated[0]} twice")
    return tensors


def _refuse_other_formats(directory: Path) -> None:
    """Check that a directory holds no weights that transformers would read before or on top of the safetensors."""
    if (directory / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{directory} has an adapter_config.json: merge the adapter into its base model with peft "
            "(merge_and_unload, save_pretrained) and give that directory; next to full weights, remove the adapter"
        )
    for file in directory.glob("shard-*.safetensors"):
        if DISTRIBUTED.fullmatch(file.name):
            raise CheckpointError(f"{file} is part of a distributed checkpoint: save the model with save_pretrained")
    config = directory / "config.json"
    if config.is_file() and read_fields(config).get("transformers_weights") is not None:
        raise CheckpointError(f"{config}: transformers_weights is not supported: rename the weights to {SINGLE}")


def _hint(directory: Path) -> str:
    """Return what a directory without weights has instead, and the step that helps, for the end of a message."""
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    gguf = sorted(p.name for p in directory.glob("*.gguf"))
    if others:
        return (
            f" by the name {SINGLE} (it has {quote(others[0])}: rename a single file so, copy the {INDEX} of several)"
        )
    if pickles:
        return f" (it has {', '.join(pickles[:3])}: pickles are never read; save it with safetensors)"
    if gguf:
        return f" (it has {quote(gguf[0])}: {GGUF_STEP})"
    return ""
