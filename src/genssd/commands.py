"""Functions that run the commands and print their results: `select` calls `run_select`, and so on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from genssd.distill.console import ProgressLine, report_training
from genssd.distill.demo.config import DemoConfig
from genssd.distill.demo.run import run_demo
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.run import run_diagnose
from genssd.distill.diagnose.verdict import write_verdict
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import run_evaluate
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.rounds.run import BudgetReached, run_distill
from genssd.distill.runs.field_kinds import expand_home
from genssd.distill.score.config import ScoreConfig
from genssd.distill.score.control_text import describe_teacher, format_controls, shorten
from genssd.distill.score.leaf import run_leaf
from genssd.distill.score.leaf_config import LeafConfig
from genssd.distill.score.prefix import run_prefix
from genssd.distill.score.prefix_config import PrefixConfig
from genssd.distill.score.prefix_judges import warn_of_unmarked
from genssd.distill.score.run import run_score
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.export import run_export
from genssd.distill.select.export_config import ExportConfig
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.distill.select.reselect import run_reselect
from genssd.distill.select.reselect_config import ReselectConfig
from genssd.distill.select.run import run_select
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train
from genssd.distill.tune.config import TuneConfig
from genssd.distill.tune.run import run_tune
from genssd.doctor_command import doctor, env, examine_first
from genssd.engine.common.amounts import format_count
from genssd.engine.common.outcomes import SPECIAL
from genssd.engine.host.threads import limit_torch_threads
from genssd.kernels.tune_file import FILE_VARIABLE
from genssd.outputs import print_outputs
from genssd.printing import (
    describe_rounds,
    list_counts,
    list_statuses,
    print_accuracy,
    print_cuts,
    print_undecided,
    print_writers,
    raise_for_bad_rows,
    raise_for_problems,
    warn,
)
from genssd.report_command import report
from genssd.reproduce_command import reproduce
from genssd.stopping import is_main_process

EXAMINED_FIRST = frozenset(("select", "train", "distill"))
"""Commands whose inputs the doctor examines before they begin, in one line."""


def demo(config: DemoConfig, console: Console) -> None:
    run_demo(config, Console(), console)
    print_outputs("demo", config.output_dir)


def select(config: SelectConfig, console: Console) -> None:
    with ProgressLine("select", console) as line:
        summary = run_select(config, report=line)
    if summary.calibration is not None:
        print(f"threshold {summary.calibration}")
    is_empty = not summary.prompts and summary.stopped_by is not None
    if not is_empty:
        print(f"{format_count(summary.prompts, 'prompt')}: {list_statuses(summary.statuses)}")
        print(
            f"{format_count(summary.tokens_kept, 'token')} kept of {summary.tokens_sampled:,} sampled; "
            f"{describe_rounds(summary.median_chunks)}"
        )
    for teacher in summary.teachers:
        print(teacher)
    if any(name in summary.rounds for name in SPECIAL):
        print(f"rounds: {', '.join(f'{count:,} {name}' for name, count in sorted(summary.rounds.items()))}")
    print_accuracy(summary.accuracy)
    print_cuts(summary.cuts, summary.prompts)
    if is_empty:
        print(f"nothing was written to {summary.path}")
    else:
        print_outputs("select", summary.path.parent)
    if summary.drifted:
        warn(
            f"{format_count(summary.drifted, 'response')} whose tokens of the student were others chunk by chunk than "
            "as a whole, and that were scored again: please report the pair of models",
            console,
        )
    if (stop := summary.describe_stop(config.total_budget)) is not None:
        print(stop)
    if summary.missing_tokens:
        warn(
            f"{format_count(sum(summary.missing_tokens.values()), 'prompt')} without a selection, because the "
            f"{'teachers' if summary.teachers else 'teacher'} wrote a "
            f"token that the student does not have: {list_counts(summary.missing_tokens)}",
            console,
        )
    retried = len(summary.failures) - sum(summary.missing_tokens.values())
    raise_for_problems(summary.bad_rows, retried, summary.path.parent)


def generate(config: GenerateConfig, console: Console) -> None:
    with ProgressLine("generate", console) as line:
        summary = run_generate(config, report=line)
    statuses = list_statuses(summary.statuses)
    print(
        f"{format_count(summary.prompts, 'prompt')}, {format_count(summary.tokens, 'token')} in responses: {statuses}"
    )
    if config.method == "rsd":
        print(
            f"{format_count(summary.substituted, 'token')} by the student "
            f"({summary.substituted / max(1, summary.tokens):.1%})"
        )
    if summary.writers is not None:
        print_writers(summary.writers, summary.tokens_sampled)
    print_accuracy(summary.accuracy)
    print_cuts(summary.cuts, sum(summary.statuses.values()))
    print_outputs("generate", summary.path.parent)
    raise_for_problems(summary.bad_rows, len(summary.failures), summary.path.parent)


def prefix(config: PrefixConfig, console: Console) -> None:
    with ProgressLine("prefix", console) as line:
        summary = run_prefix(config, report=line)
    print(
        f"{format_count(summary.traces, 'trace')}: {summary.mean_fraction:.0%} of the steps kept on average, "
        f"{summary.whole} left "
        f"whole; {summary.kept} are finished and not known to be wrong"
    )
    if (counts := summary.replies).unmarked:
        print(
            f"without a verdict, counted as not enough: {counts.unmarked} of {format_count(counts.replies, 'reply')} "
            "of "
            f"the judge; whole because all replies had none: {format_count(counts.unmarked_whole, 'trace')}"
        )
    if (warning := warn_of_unmarked(counts)) is not None:
        warn(warning, console)
    print_undecided(summary.undecided)
    print_outputs("prefix", summary.output_dir)
    raise_for_bad_rows("could not be used; all others were", summary.bad_rows, summary.output_dir)


def leaf(config: LeafConfig, console: Console) -> None:
    with ProgressLine("leaf", console) as line:
        summary = run_leaf(config, report=line)
    print(
        f"{format_count(summary.traces, 'trace')}, {format_count(summary.counterfactuals, 'counterfactual')} beside "
        "them"
    )
    print_outputs("leaf", summary.output_dir)
    raise_for_bad_rows("could not be used; all others were", summary.bad_rows, summary.output_dir)


def train(config: TrainConfig, console: Console) -> None:
    is_main = os.environ.get("RANK", "0") == "0"  # only one of the processes of torchrun prints
    console = console if is_main else Console(quiet=True)
    with ProgressLine("train", console) as line:
        summary = run_train(config, report=report_training(line))
    if not is_main:
        return
    for reason, count in summary.left_out.items():
        print(f"left out: {format_count(count, 'row')} ({reason})")
    print(
        f"{format_count(summary.steps, 'step')} on {format_count(summary.examples, 'example')}, "
        f"{format_count(summary.tokens, 'completion token')} in "
        f"{summary.seconds:.1f} s; last loss {summary.loss:.4f}"
    )
    print_outputs("train", summary.output_dir)


def distill(config: DistillConfig, console: Console) -> None:
    with ProgressLine("distill", console) as line:
        try:
            student, bad_rows = _print_rounds(config, line)
        except BudgetReached as reached:
            with line.paused():
                print(reached)
            return
    print(f"the student is {student}")
    print_outputs("distill", config.output_dir)
    raise_for_bad_rows("could not be used; all others were", bad_rows, Path(config.output_dir))


def _print_rounds(config: DistillConfig, line: ProgressLine) -> tuple[str, tuple[str, ...]]:
    """Run the rounds and print each as it ends; return the last student, and the rows that could not be used."""
    bad_rows: dict[str, None] = {}
    for summary in run_distill(config, report=line):
        score = "" if summary.mean_score is None else f", {config.select.criterion} {summary.mean_score:.4g}"
        left_out = "".join(f", {count} {reason}" for reason, count in summary.left_out.items())
        bad_rows |= dict.fromkeys(summary.bad_rows)
        accuracy = "" if summary.accuracy is None else f", accuracy {summary.accuracy:.1%}"
        with line.paused():
            print(
                f"round {summary.round}: {summary.kept} of {summary.prompts} kept{left_out}, "
                f"{summary.mean_tokens:.0f} tokens on average{score}; last loss {summary.loss:.4f}{accuracy}"
            )
    return summary.student, tuple(bad_rows)


def evaluate(config: EvaluateConfig, console: Console) -> None:
    with ProgressLine("evaluate", console) as line:
        result = run_evaluate(config, report=line)
    print(f"greedy accuracy {result.accuracy} over {format_count(len(result.correct), 'problem')} (95 % interval)")
    if result.avg_at_k is not None:
        print(f"avg@{result.samples} {result.avg_at_k} (95 % interval over problems)")
    print(f"{result.mean_tokens:.0f} tokens per response, {result.unfinished} cut off")
    print_undecided(result.undecided)
    print_cuts(result.cuts, len(result.correct))
    print_outputs("evaluate", config.output_dir)
    raise_for_bad_rows("could not be evaluated; all others were", result.not_evaluated, Path(config.output_dir))


def score(config: ScoreConfig, console: Console) -> None:
    with ProgressLine("score", console) as line:
        summary = run_score(config, report=line)
    print(
        f"{format_count(summary.traces, 'trace')} of {format_count(summary.prompts, 'prompt')} scored, "
        f"{format_count(summary.selected, 'response')} picked"
    )
    print_undecided(summary.undecided)
    for name, ranks in summary.teachers.items():
        print(
            f"teachers by {name} (95 % interval over {format_count(ranks[0].prompts, 'prompt')}; share of draws in "
            "front):"
        )
        wins = {one.teacher: describe_teacher(one) for one in summary.controls.of(name).teachers}
        for rank in ranks:
            print(
                f"  {shorten(rank.teacher):<24} {rank.value:9.4f} [{rank.low:.4f}, {rank.high:.4f}] {rank.first:4.0%}  "
                f"{wins[rank.teacher]}".rstrip()
            )
    if summary.teachers and summary.incomplete:
        print(f"left out of the ranking: {format_count(summary.incomplete, 'prompt')} that some teacher did not answer")
    print("\n".join(format_controls(summary.controls)))
    print_outputs("score", summary.output_dir)
    raise_for_bad_rows("could not be scored; all others were", summary.bad_rows, summary.output_dir)


def diagnose(config: DiagnoseConfig, console: Console) -> None:
    with ProgressLine("diagnose", console) as line:
        summary = run_diagnose(config, report=line)
    for sentence in write_verdict(summary.diagnosis):
        print(f"* {sentence}")
    print_undecided(summary.diagnosis.undecided)
    costs = summary.diagnosis.costs
    print(
        f"{format_count(costs.completions, 'completion')}, {format_count(costs.sampled_tokens, 'token')} in them; "
        f"{format_count(costs.prefix_tokens, 'token')} "
        f"computed in front of them, {costs.naive_prefix_tokens:,} with a fresh generation per forced token"
    )
    print_outputs("diagnose", summary.output_dir)
    raise_for_bad_rows("could not be used; all others were", summary.bad_rows, summary.output_dir)


def reselect(config: ReselectConfig, console: Console) -> None:
    summary = run_reselect(config)
    print(
        f"{format_count(summary.rounds, 'round')} of {format_count(summary.prompts, 'prompt')} judged again by "
        f"{summary.criterion}"
    )
    share = summary.differing / max(1, summary.contested)
    print(
        f"{summary.differing} of {format_count(summary.contested, 'contested round')} came out differently "
        f"({share:.0%})"
    )
    if summary.largest_change == summary.largest_change:
        print(f"the run's own criterion: no value moved by more than {summary.largest_change:.2g}")
    print(
        f"{format_count(summary.pairs, 'preference pair')} ({summary.exact_pairs} exact) and "
        f"{format_count(summary.steps, 'stepwise row')} by "
        f"{summary.criterion}"
    )
    print_outputs("reselect", summary.output_dir)


def export(config: ExportConfig, console: Console) -> None:
    summary = run_export(config)
    for reason, count in summary.left_out.items():
        print(f"left out: {format_count(count, 'row')} ({reason})")
    print(
        f"{format_count(summary.rows, 'row')} with the {summary.k} most likely tokens at "
        f"{format_count(summary.tokens, 'token')}"
    )
    print_outputs("export", summary.output_dir)


def tune(config: TuneConfig, console: Console) -> None:
    summary = run_tune(config, report=print)
    print(f"{format_count(summary.problems, 'result')} for {summary.card} written to {summary.path}")
    if config.tune_file is not None:
        print(f"the other commands read it where {FILE_VARIABLE}={summary.path} is set")


COMMANDS: dict[str, Callable[[Any, Console], int | None]] = {
    "demo": demo,
    "select": select,
    "score": score,
    "reselect": reselect,
    "export": export,
    "generate": generate,
    "prefix": prefix,
    "leaf": leaf,
    "train": train,
    "evaluate": evaluate,
    "distill": distill,
    "diagnose": diagnose,
    "report": report,
    "reproduce": reproduce,
    "tune": tune,
    "doctor": doctor,
    "env": env,
}
"""Functions by the name of the command; their configs are in configs.py."""


def run_command(name: str, config: Any, console: Console, words: Sequence[str] = ()) -> int:
    """Run a command, after replacing a leading `~` in the config's names of files, directories and models.

    words: what `doctor` examines, a command and its flags. Returns the exit code.
    """
    transformers_logging.disable_progress_bar()
    limit_torch_threads()
    config = expand_home(config)
    if name == "doctor":
        return doctor(config, console, words)
    if name in EXAMINED_FIRST and is_main_process():
        examine_first(name, config, console)
    return COMMANDS[name](config, console) or 0
