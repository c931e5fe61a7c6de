"""What the commands print: one function per command, over the configs and functions of distill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console

from genssd.distill.console import ProgressLine, counting, selecting, training
from genssd.distill.demo import DemoConfig, run_demo
from genssd.distill.evaluating import EvaluateConfig, run_evaluate
from genssd.distill.selecting import SelectConfig, run_select
from genssd.distill.training import TrainConfig, run_train
from genssd.engine.errors import CapacityError

SHOWN = 10  # failures listed


def demo(config: DemoConfig, console: Console) -> None:
    run_demo(config, Console(), console)


def select(config: SelectConfig, console: Console) -> None:
    with ProgressLine("select", console) as line:
        summary = run_select(config, report=selecting(line))
    counts = ", ".join(f"{count} {status}" for status, count in sorted(summary.statuses.items()))
    print(f"{summary.prompts} prompts: {counts}")
    print(f"{summary.tokens_kept:,} tokens kept of {summary.tokens_sampled:,} sampled")
    print(f"written to {summary.path}")
    if summary.failures:
        listed = "".join(f"\n  {failure}" for failure in summary.failures[:SHOWN])
        raise CapacityError(f"{len(summary.failures)} prompts are missing; --resume tries them again:{listed}")


def train(config: TrainConfig, console: Console) -> None:
    with ProgressLine("train", console) as line:
        summary = run_train(config, report=training(line))
    for reason, count in summary.left_out.items():
        print(f"left out: {count} rows ({reason})")
    print(
        f"{summary.steps} steps on {summary.examples} examples, {summary.tokens:,} completion tokens in "
        f"{summary.seconds:.1f} s; last loss {summary.loss:.4f}"
    )
    print(f"written to {summary.output_dir}")


def evaluate(config: EvaluateConfig, console: Console) -> None:
    with ProgressLine("evaluate", console) as line:
        result = run_evaluate(config, report=counting(line, "responses"))
    print(f"greedy accuracy {result.accuracy} over {len(result.correct)} problems (95 % interval)")
    if result.avg_at_k is not None:
        print(f"avg@{result.samples} {result.avg_at_k}")
    print(f"{result.mean_tokens:.0f} tokens per response, {result.unfinished} cut at max_tokens")
    print(f"written to {config.output_dir}")


COMMANDS: dict[str, tuple[type, Callable[[Any, Console], None]]] = {
    "demo": (DemoConfig, demo),
    "select": (SelectConfig, select),
    "train": (TrainConfig, train),
    "evaluate": (EvaluateConfig, evaluate),
}
