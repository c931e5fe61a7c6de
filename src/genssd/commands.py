"""Functions that run the commands and print their results: `select` calls `run_select`, and so on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from genssd.distill.answers.accuracy import Accuracy
from genssd.distill.console import ProgressLine, report_training
from genssd.distill.data.response_limits import describe_cuts
from genssd.distill.demo import DemoConfig, run_demo
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.run import run_diagnose
from genssd.distill.diagnose.verdict import write_verdict
from genssd.distill.doctor.config import DoctorConfig, EnvConfig
from genssd.distill.doctor.console import show_findings, write_json
from genssd.distill.doctor.env import describe_environment
from genssd.distill.doctor.examine import examine, summarise
from genssd.distill.doctor.findings import LEVELS, find_worst
from genssd.distill.doctor.settings import read_settings
from genssd.distill.evaluating import EvaluateConfig, run_evaluate
from genssd.distill.report.config import ReportConfig
from genssd.distill.rounds import BudgetReached, DistillConfig, run_distill
from genssd.distill.runs.effects import check_effects
from genssd.distill.runs.settings import expand_home
from genssd.distill.score.control_text import describe_teacher, format_controls, shorten
from genssd.distill.score.leaf import LeafConfig, run_leaf
from genssd.distill.score.prefix import PrefixConfig, run_prefix
from genssd.distill.score.prefix_judges import warn_of_unmarked
from genssd.distill.score.run import ScoreConfig, run_score
from genssd.distill.select.generate import GenerateConfig, run_generate
from genssd.distill.select.reselect import ReselectConfig, run_reselect
from genssd.distill.select.run import SelectConfig, run_select
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train
from genssd.distill.tuning import TuneConfig, run_tune
from genssd.engine.amounts import format_count
from genssd.engine.errors import GenssdError, InputError
from genssd.engine.quoting import one_line
from genssd.engine.selection import SPECIAL
from genssd.engine.threads import limit_torch_threads
from genssd.examined import read_examined
from genssd.kernels.tuned import FILE_VARIABLE
from genssd.report_command import report
from genssd.stopping import is_main_process

EXAMINED_FIRST = frozenset(("select", "train", "distill"))
"""Commands whose inputs the doctor examines before they begin, in one line."""
PLAIN_WIDTH = 100
"""Columns of what the doctor prints where its output is no terminal."""
MAX_LISTED = 10  # failures or bad rows that are listed one by one


def demo(config: DemoConfig, console: Console) -> None:
    run_demo(config, Console(), console)


def select(config: SelectConfig, console: Console) -> None:
    with ProgressLine("select", console) as line:
        summary = run_select(config, report=line)
    if summary.calibration is not None:
        print(f"threshold {summary.calibration}")
    is_empty = not summary.prompts and summary.stopped_by is not None
    if not is_empty:
        print(f"{format_count(summary.prompts, 'prompt')}: {_list_statuses(summary.statuses)}")
        print(f"{format_count(summary.tokens_kept, 'token')} kept of {summary.tokens_sampled:,} sampled")
    if any(name in summary.rounds for name in SPECIAL):
        print(f"rounds: {', '.join(f'{count:,} {name}' for name, count in sorted(summary.rounds.items()))}")
    _print_accuracy(summary.accuracy)
    _print_cuts(summary.cuts, summary.prompts)
    print(f"nothing was written to {summary.path}" if is_empty else f"written to {summary.path}")
    if summary.drifted:
        _warn(
            f"{format_count(summary.drifted, 'response')} whose tokens of the student were others chunk by chunk than "
            "as a whole, and that were scored again: please report the pair of models",
            console,
        )
    if (stop := summary.describe_stop(config.total_budget)) is not None:
        print(stop)
    if summary.missing_tokens:
        _warn(
            f"{format_count(sum(summary.missing_tokens.values()), 'prompt')} without a selection, because the "
            "teacher wrote a "
            f"token that the student does not have: {_list_counts(summary.missing_tokens)}",
            console,
        )
    retried = len(summary.failures) - sum(summary.missing_tokens.values())
    _raise_for_problems(summary.bad_rows, retried, summary.path.parent)


def generate(config: GenerateConfig, console: Console) -> None:
    with ProgressLine("generate", console) as line:
        summary = run_generate(config, report=line)
    statuses = _list_statuses(summary.statuses)
    print(
        f"{format_count(summary.prompts, 'prompt')}, {format_count(summary.tokens, 'token')} in responses: {statuses}"
    )
    if config.method == "rsd":
        print(
            f"{format_count(summary.substituted, 'token')} by the student "
            f"({summary.substituted / max(1, summary.tokens):.1%})"
        )
    _print_accuracy(summary.accuracy)
    _print_cuts(summary.cuts, sum(summary.statuses.values()))
    print(f"written to {summary.path}")
    _raise_for_problems(summary.bad_rows, len(summary.failures), summary.path.parent)


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
        _warn(warning, console)
    _print_undecided(summary.undecided)
    print(f"written to {summary.output_dir}")
    _raise_for_bad_rows("could not be used; all others were", summary.bad_rows, summary.output_dir)


def leaf(config: LeafConfig, console: Console) -> None:
    with ProgressLine("leaf", console) as line:
        summary = run_leaf(config, report=line)
    print(
        f"{format_count(summary.traces, 'trace')}, {format_count(summary.counterfactuals, 'counterfactual')} beside "
        "them"
    )
    print(f"written to {summary.output_dir}")
    _raise_for_bad_rows("could not be used; all others were", summary.bad_rows, summary.output_dir)


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
    print(f"written to {summary.output_dir}")


def distill(config: DistillConfig, console: Console) -> None:
    with ProgressLine("distill", console) as line:
        try:
            student, bad_rows = _print_rounds(config, line)
        except BudgetReached as reached:
            with line.paused():
                print(reached)
            return
    print(f"written to {config.output_dir}; the student is {student}")
    _raise_for_bad_rows("could not be used; all others were", bad_rows, Path(config.output_dir))


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
    _print_undecided(result.undecided)
    _print_cuts(result.cuts, len(result.correct))
    print(f"written to {config.output_dir}")
    _raise_for_bad_rows("could not be evaluated; all others were", result.not_evaluated, Path(config.output_dir))


def score(config: ScoreConfig, console: Console) -> None:
    with ProgressLine("score", console) as line:
        summary = run_score(config, report=line)
    print(
        f"{format_count(summary.traces, 'trace')} of {format_count(summary.prompts, 'prompt')} scored, "
        f"{format_count(summary.selected, 'response')} picked"
    )
    _print_undecided(summary.undecided)
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
    print(f"written to {summary.output_dir}; look at {summary.output_dir / 'report.html'}")
    _raise_for_bad_rows("could not be scored; all others were", summary.bad_rows, summary.output_dir)


def diagnose(config: DiagnoseConfig, console: Console) -> None:
    with ProgressLine("diagnose", console) as line:
        summary = run_diagnose(config, report=line)
    for sentence in write_verdict(summary.diagnosis):
        print(f"* {sentence}")
    _print_undecided(summary.diagnosis.undecided)
    costs = summary.diagnosis.costs
    print(
        f"{format_count(costs.completions, 'completion')}, {format_count(costs.sampled_tokens, 'token')} in them; "
        f"{format_count(costs.prefix_tokens, 'token')} "
        f"computed in front of them, {costs.naive_prefix_tokens:,} with a fresh generation per forced token"
    )
    print(f"written to {summary.output_dir}; look at {summary.output_dir / 'diagnosis.html'}")
    _raise_for_bad_rows("could not be used; all others were", summary.bad_rows, summary.output_dir)


def _print_accuracy(accuracy: Accuracy) -> None:
    """Print the accuracy of responses with a reference answer, if there are any, and how many are wrong."""
    if accuracy.estimate is not None:
        print(
            f"accuracy {accuracy.estimate} over {format_count(accuracy.judged, 'response')} with a reference answer "
            "(95 % interval): "
            f"{accuracy.correct} correct, {accuracy.wrong} wrong, {accuracy.undecided} undecided"
        )
        _print_undecided(accuracy.undecided)


def _print_cuts(cuts: Mapping[str, int], responses: int) -> None:
    """Print what cut the responses off, and the remedy, where it was most of them."""
    line = describe_cuts(cuts, responses)
    if line is not None:
        print(line)


def _raise_for_problems(bad_rows: Sequence[str], misfits: int, output_dir: Path) -> None:
    """Raise an error that lists the first rows that could not be used, if there are any.

    misfits: number of those that did not fit.
    """
    if bad_rows:
        again = f" ({misfits} of them did not fit: --resume tries them again)" if misfits else ""
        _raise_for_bad_rows(f"could not be used; all others were{again}", bad_rows, output_dir)


def _list_statuses(statuses: Mapping[str, int]) -> str:
    """Return how many responses have each status, in words."""
    return _list_counts(statuses) or "none was run"


def _list_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _warn(text: str, console: Console) -> None:
    console.print(f"genssd: {text}", highlight=False, soft_wrap=True, markup=False)


def _print_undecided(count: int) -> None:
    """Print how many responses could not be judged, where there are any."""
    if count:
        print(
            f"could not be judged, and counted as not correct: {format_count(count, 'response')}; the field "
            "`undecided` "
            "gives the reason"
        )


def _raise_for_bad_rows(outcome: str, bad_rows: Sequence[str], output_dir: Path) -> None:
    """Raise InputError that lists the first bad rows, if there are any. outcome: what follows the number of rows."""
    if bad_rows:
        listed = "".join(f"\n  {message}" for message in bad_rows[:MAX_LISTED])
        more = len(bad_rows) - MAX_LISTED
        tail = f"\n  and {more} more in {output_dir / 'bad_rows.txt'}" if more > 0 else ""
        raise InputError(f"{format_count(len(bad_rows), 'row')} {outcome}:{listed}{tail}")


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
        f"{summary.criterion}; written to {summary.output_dir}"
    )


def tune(config: TuneConfig, console: Console) -> None:
    summary = run_tune(config, report=print)
    print(f"{format_count(summary.problems, 'result')} for {summary.card} written to {summary.path}")
    if config.tune_file is not None:
        print(f"the other commands read it where {FILE_VARIABLE}={summary.path} is set")


def doctor(config: DoctorConfig, console: Console, words: Sequence[str] = ()) -> int:
    """Examine and print; return the exit code. words: a command and its flags, which were typed after the doctor's."""
    check_effects(config)
    settings = read_examined(config, words)
    findings = examine(settings, rows=config.rows, verify_seconds=config.verify_seconds if config.verify else None)
    if config.json:
        print(write_json(findings, settings.command))
    else:
        screen = Console()
        show_findings(findings, screen if screen.is_terminal else Console(width=PLAIN_WIDTH))
    return LEVELS.index(find_worst(findings))


def env(config: EnvConfig, console: Console) -> None:
    print(describe_environment())


def _examine_first(command: str, config: Any, console: Console) -> None:
    """Print one line of the doctor on the inputs of a command. What the command refuses at once is left to it.

    A fault of the doctor's own is such a line as well: it must not keep a command from running.
    """
    try:
        line = summarise(read_settings(command, config))
    except GenssdError:
        return
    except Exception as error:
        line = f"the doctor failed and is left out, please report it: {type(error).__name__}: {one_line(error)}"
    if line is not None:
        _warn(line, console)


COMMANDS: dict[str, tuple[type, Callable[[Any, Console], int | None]]] = {
    "demo": (DemoConfig, demo),
    "select": (SelectConfig, select),
    "score": (ScoreConfig, score),
    "reselect": (ReselectConfig, reselect),
    "generate": (GenerateConfig, generate),
    "prefix": (PrefixConfig, prefix),
    "leaf": (LeafConfig, leaf),
    "train": (TrainConfig, train),
    "evaluate": (EvaluateConfig, evaluate),
    "distill": (DistillConfig, distill),
    "diagnose": (DiagnoseConfig, diagnose),
    "report": (ReportConfig, report),
    "tune": (TuneConfig, tune),
    "doctor": (DoctorConfig, doctor),
    "env": (EnvConfig, env),
}


def run_command(name: str, config: Any, console: Console, words: Sequence[str] = ()) -> int:
    """Run a command, after replacing a leading `~` in the config's names of files, directories and models.

    words: what `doctor` examines, a command and its flags. Returns the exit code.
    """
    limit_torch_threads()
    config = expand_home(config)
    if name == "doctor":
        return doctor(config, console, words)
    if name in EXAMINED_FIRST and is_main_process():
        _examine_first(name, config, console)
    return COMMANDS[name][1](config, console) or 0
