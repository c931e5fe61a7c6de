"""Check of the machine: the kernels that it will use, and why not others."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from genssd.distill.doctor.findings import Finding, Piece
from genssd.distill.doctor.inputs import Inputs
from genssd.engine.common.errors import GenssdError
from genssd.engine.host.machine import ROOT, read_cpu_features, read_cpu_name
from genssd.engine.host.threads import choose_engine_threads
from genssd.engine.setup.memory import choose_device, choose_dtype, describe_float32
from genssd.kernels.native import instruction_set, list_instruction_sets
from genssd.kernels.tuned import SHIPPED_CAPABILITIES, TuneFileError, card_of, default_path, read_entries

FEATURES: dict[str, tuple[str, ...]] = {
    "amx": ("amx_tile", "amx_bf16", "avx512_bf16"),
    "avx512_bf16": ("avx512_bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
}
if platform.machine() in ("aarch64", "arm64"):
    FEATURES = {"neon": ("asimd",)}
"""What every set of native kernels of this kind of processor needs, by the names of /proc/cpuinfo; the best first."""


def check_kernels(inputs: Inputs) -> list[Finding]:
    """Find the device, the kernels, and what speaks against faster ones."""
    options = inputs.settings.engine or inputs.settings.training
    try:
        device = choose_device(None if options is None else options.device)
    except GenssdError as error:
        return [Finding(name="kernels", level="error", line=str(error), fix="take --device cpu, or mend the driver")]
    threads = choose_engine_threads(None if options is None else options.threads)
    lines = [f"cuda: {describe_cuda()}", *describe_sets(), f"triton: {describe_triton()}"]
    lines.append(f"threads: {threads.count} ({threads.reason})")
    detail = (Piece("\n".join(lines)),)
    if device.type == "cuda":
        return [_check_cuda(device, detail)]
    name = instruction_set()
    if name is None:
        return [
            Finding(
                name="kernels",
                level="warning",
                line=f"{read_cpu_name()}: no native kernels, plain torch serves, more slowly",
                detail=detail,
                fix="take an x86-64 processor with AVX2, a 64-bit ARM processor, or a GPU",
            )
        ]
    line = f"native kernels of {name} on {read_cpu_name()}, {threads.count} of its cores"
    unused = [other for other in FEATURES if other not in list_instruction_sets() and has_features(other)]
    if unused:
        return [
            Finding(
                name="kernels",
                level="warning",
                line=f"{line}; not {unused[0]}, although the processor has it",
                detail=detail,
                fix="build genssd again with a newer assembler (binutils 2.36), and let the system grant the tile "
                "registers (Linux 5.16)",
            )
        ]
    return [Finding(name="kernels", level="ok", line=line, detail=detail, fix=_advise_dtype(inputs, device))]


def describe_sets(root: Path = ROOT) -> Iterator[str]:
    """Yield a line for every set of native kernels: in use, or why not."""
    used, runs = instruction_set(), list_instruction_sets()
    features = read_cpu_features(root)
    for name, needed in FEATURES.items():
        missing = [feature for feature in needed if feature not in features]
        if name == used:
            yield f"{name}: in use"
        elif name in runs:
            yield f"{name}: runs here too; {used} is faster"
        elif missing:
            yield f"{name}: this processor lacks {', '.join(missing)}"
        else:
            yield f"{name}: the processor has it, but this build lacks its kernels, or the system does not grant it"


def has_features(name: str, root: Path = ROOT) -> bool:
    """Return whether the processor has what a set of native kernels needs."""
    return read_cpu_features(root).issuperset(FEATURES[name])


def describe_cuda() -> str:
    """Return which CUDA devices torch sees, or why it sees none."""
    if torch.cuda.is_available():
        return ", ".join(card_of(torch.device("cuda", i)).name for i in range(torch.cuda.device_count()))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without it"
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
    return f"torch {torch.__version__} finds no device{hidden}"


def describe_triton() -> str:
    """Return whether Triton is installed, which the kernels on a GPU need."""
    return "installed" if find_spec("triton") is not None else "not installed; the kernels on a GPU need it"


def _check_cuda(device: torch.device, detail: tuple[Piece, ...]) -> Finding:
    card = card_of(device)
    if find_spec("triton") is None:
        fix = "pip install triton"
        return Finding(name="kernels", level="error", line=f"{card.name}: Triton is missing", detail=detail, fix=fix)
    path = default_path()
    try:
        is_tuned = any(other == card for other, _, _ in read_entries(path))
    except TuneFileError as error:
        fix = "delete it, and run `genssd tune` again"
        return Finding(name="kernels", level="warning", line=str(error), detail=detail, fix=fix)
    if is_tuned:
        line = f"Triton kernels tuned for {card.name} ({path})"
        return Finding(name="kernels", level="ok", line=line, detail=detail)
    source = f"shipped for {card.capability}" if card.capability in SHIPPED_CAPABILITIES else "generic"
    return Finding(
        name="kernels",
        level="ok",
        line=f"Triton kernels, {source}, on {card.name}: not tuned for it",
        detail=detail,
        fix="genssd tune measures faster configurations once, in two minutes",
    )


def _advise_dtype(inputs: Inputs, device: torch.device) -> str | None:
    """Return advice to take bfloat16 where the CPU multiplies it in hardware and a model computes in float32."""
    engine = inputs.settings.engine
    if engine is None or engine.dtype != "auto":
        return None
    dtypes = {role: choose_dtype(model.directory, "auto", device) for role, model in inputs.models.items()}
    return describe_float32(dtypes, device)
