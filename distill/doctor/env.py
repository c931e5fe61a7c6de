"""`genssd env`: versions, machine and kernels as plain text, for bug reports. Nothing of it names files or users."""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from genssd import _core
from genssd.distill.doctor.machine_checks import describe_cuda, describe_sets, describe_triton
from genssd.distill.runs.source_version import find_commit
from genssd.engine.common.amounts import format_bytes
from genssd.engine.host.machine import available_cores, available_memory, read_cpu_name
from genssd.engine.host.threads import choose_engine_threads
from genssd.kernels.tuned import FILE_VARIABLE, TuneFileError, card_of, default_path, read_entries

PACKAGES = (
    *("genssd", "torch", "transformers", "tokenizers", "safetensors", "numpy", "huggingface_hub", "jinja2"),
    *("math-verify", "triton", "peft", "datasets", "trl", "accelerate"),
)
"""Packages whose versions are listed."""
VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "KMP_BLOCKTIME", "CUDA_VISIBLE_DEVICES"),
    *("WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TORCHDYNAMO_DISABLE"),
)
"""Environment variables whose values are listed: numbers and words, no secrets and no paths."""


def describe_environment() -> str:
    """Return the report, a line per fact."""
    return "\n".join(f"{name}: {value}" for name, value in _iter_facts())


def _iter_facts() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        yield name, _find_version(name)
    yield "commit of genssd", find_commit() or "unknown: installed as a package"
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    libc = " ".join(platform.libc_ver()) or "unknown"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}, {libc}"
    yield "processor", read_cpu_name()
    yield "cores given", str(available_cores())
    yield "memory free for this process", format_bytes(available_memory())
    threads = choose_engine_threads(None)
    yield "threads", str(threads).removeprefix("computing with ")
    yield "compiler of the native kernels", read_compiler(Path(_core.__file__)) or "unknown"
    for line in describe_sets():
        name, _, state = line.partition(": ")
        yield f"kernels of {name}", state
    yield "cuda", describe_cuda()
    if torch.cuda.is_available():
        yield "cuda version", str(torch.version.cuda or torch.version.hip)
        for index in range(torch.cuda.device_count()):
            card = card_of(torch.device("cuda", index))
            free, total = torch.cuda.mem_get_info(index)
            yield f"device {index}", f"{card.name} ({card.capability}), {format_bytes(free)} of {format_bytes(total)}"
    yield "triton for the kernels", describe_triton()
    yield "tune file", _describe_tune_file()
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]


def read_compiler(library: Path) -> str | None:
    """Return what compiled a shared library, by the section .comment of its ELF file; None where it has none."""
    data = library.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":  # 64 bits, little endian
        return None
    (start,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, start + i * size) for i in range(count)]
    strings = data[headers[names][4] :]
    for name, _, _, _, offset, length in headers:
        if strings[name : name + 9] == b".comment\0":
            texts = data[offset : offset + length].decode(errors="replace").split("\0")
            return ", ".join(dict.fromkeys(filter(None, texts))) or None
    return None


def _find_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _describe_tune_file() -> str:
    """Return which cards the tune file holds configurations for."""
    named = f" (named by {FILE_VARIABLE})" if FILE_VARIABLE in os.environ else ""
    try:
        cards = sorted({card.name for card, _, _ in read_entries(default_path())})
    except TuneFileError:
        return f"cannot be read{named}"
    return f"{', '.join(cards) or 'none'}{named}"
