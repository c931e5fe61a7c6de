"""The options of every command that runs the engine. engines.py loads models under them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import Operational
from genssd.engine.common.model_choices import Backend
from genssd.engine.common.options_check import check_types


@dataclass(frozen=True, kw_only=True)  # no slots: a class derives from only one base that has them
class EngineOptions:
    """The arguments of `Engine.from_pretrained` other than the models."""

    NEEDS: ClassVar[Needs] = {
        "memory_utilization": Need(lambda o: o.memory_bytes is None, "no memory_bytes, which replace it")
    }

    device: Operational[str | None] = None
    """Device of the models. None: CUDA where there is one, else the CPU."""
    dtype: str = "auto"
    """Data type of weights and cache. auto: the checkpoint's type, or float32 on a CPU without bf16 arithmetic."""
    memory_utilization: Operational[float] = 0.9
    """Fraction of the free memory that the KV caches take together; on a CPU less, where the computation needs more
    than the rest."""
    memory_bytes: Operational[int | None] = None
    """Size of the KV caches in bytes; if given, it replaces memory_utilization."""
    max_num_seqs: Operational[int | None] = None
    """Maximum number of sequences decoded in one batch. None: 256 on a GPU; on a CPU 32 to 256, the fewer the larger
    the models are, and the more the more threads compute. A larger batch would hardly be faster there, and the first
    results would come later."""
    deterministic: Operational[bool] = True
    """On a GPU: take kernel configurations with which a token's bits do not depend on how many tokens are scored or
    drawn together. Otherwise the fastest for each number of tokens are taken (docs/tuning.md). On a CPU: no effect."""

    threads: Operational[int | None] = None
    """Number of CPU threads; results do not depend on it, but for the rounding of backend transformers. None:
    OMP_NUM_THREADS where it is set, else the cores that the process is given."""
    backend: Backend = "auto"
    """Who computes the models. genssd: the engine's own decoder. transformers: transformers' class of the model, which
    is slower. auto: the own decoder for every model whose model_type it knows, else transformers."""

    def __post_init__(self) -> None:
        check_types(self)

    def server_arguments(self) -> dict[str, Any]:
        """Return the arguments of `Engine.from_pretrained` for a teacher that a server runs."""
        return {}
