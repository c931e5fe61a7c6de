"""How a command loads its models: the flags that select and evaluate share."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.engine.engine import Engine


@dataclass(frozen=True, kw_only=True)  # no slots: a class derives from only one base that has them
class EngineOptions:
    """The arguments of `Engine.from_pretrained` beside the models."""

    device: str | None = None
    """None: CUDA where there is one, else the CPU."""
    dtype: str = "auto"
    """auto: the checkpoint's own, float32 on a CPU without bf16."""
    memory_utilization: float = 0.9
    """Share of the free memory that the caches get."""
    memory_bytes: int | None = None
    """The caches' budget in bytes instead."""
    max_batch: int = 256
    """Candidates decoded at once."""

    def load(self, *, teacher: str | None = None, student: str | None = None) -> Engine:
        """The engine over these models."""
        return Engine.from_pretrained(
            teacher=teacher,
            student=student,
            device=self.device,
            dtype=self.dtype,
            memory_utilization=self.memory_utilization,
            memory_bytes=self.memory_bytes,
            max_batch=self.max_batch,
        )
