"""Totals of the losses over the forward passes of a step and over the processes."""

from __future__ import annotations

from typing import get_args

from genssd.distill.answers.forms import Outcome
from genssd.distill.train.batches import ExampleBatch
from genssd.distill.train.distributed import World
from genssd.distill.train.losses import LossSums


class LossTotals:
    """Sums of the losses over several forward passes of this process, by the name of the metric."""

    def __init__(self, *, verified: bool = False) -> None:
        """verified: whether the completions are judged, so that the divergence is also summed by verdict."""
        self._totals: dict[str, float] = {}
        if verified:  # in every process, whatever parts it computes
            self._totals |= {f"divergence_{outcome}": 0.0 for outcome in get_args(Outcome)}

    def add(self, sums: LossSums, outcome: Outcome | None = None) -> None:
        """Add the sums of a forward pass. outcome: verdict on its completions."""
        values = {
            "loss": sums.total,
            "cross_entropy": sums.cross_entropy,
            "divergence": sums.divergence,
            "attention": sums.attention,
        }
        if outcome is not None:
            values[f"divergence_{outcome}"] = sums.divergence
        for name, value in values.items():
            if value is not None:
                self._totals[name] = self._totals.get(name, 0.0) + float(value.detach())

    def average(self, batch: ExampleBatch, world: World, *, attention_weight: float) -> dict[str, float]:
        """Return the means over the batch, whose forward passes all processes have shared; all have to call this.

        Losses are means over the completion tokens, nats, and those by verdict over the tokens with it; `attention` is
        a mean over the examples, and is added to `loss` with its weight.
        """
        totals = world.sum(self._totals)
        attention = totals.pop("attention", None)
        by_outcome = {name: totals.pop(name) for name in list(totals) if name.startswith("divergence_")}
        means = {name: value / batch.weight for name, value in totals.items()}
        for outcome in get_args(Outcome) if by_outcome else ():
            group = batch.select(outcome)
            if any(example.weight for example in group.examples):
                means[f"divergence_{outcome}"] = by_outcome[f"divergence_{outcome}"] / group.weight
        if attention is not None:
            means["attention"] = attention / len(batch.examples)
            means["loss"] += attention_weight * means["attention"]
        return means
