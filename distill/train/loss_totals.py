"""Totals of the losses over the forward passes of a step and over the processes."""

from __future__ import annotations

from genssd.distill.train.batches import ExampleBatch
from genssd.distill.train.distributed import World
from genssd.distill.train.losses import LossSums


class LossTotals:
    """Sums of the losses over several forward passes of this process, by the name of the metric."""

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}

    def add(self, sums: LossSums) -> None:
        """Add the sums of a forward pass."""
        values = {
            "loss": sums.total,
            "cross_entropy": sums.cross_entropy,
            "divergence": sums.divergence,
            "attention": sums.attention,
        }
        for name, value in values.items():
            if value is not None:
                self._totals[name] = self._totals.get(name, 0.0) + float(value.detach())

    def average(self, batch: ExampleBatch, world: World, *, attention_weight: float) -> dict[str, float]:
        """Return the means over the batch, whose forward passes all processes have shared; all have to call this.

        Losses are means over the completion tokens, nats; `attention` is a mean over the examples, and is added to
        `loss` with its weight.
        """
        totals = world.sum(self._totals)
        attention = totals.pop("attention", None)
        means = {name: value / batch.weight for name, value in totals.items()}
        if attention is not None:
            means["attention"] = attention / len(batch.examples)
            means["loss"] += attention_weight * means["attention"]
        return means
