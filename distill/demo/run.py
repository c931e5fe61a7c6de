"""`genssd demo`: the whole job on the small pair, in minutes on a laptop without a GPU.

The teacher writes every step of a sum in one of three styles, drawn at random for each step: spelled out digit by
digit, jumped to the result, or with a detour over a wrong result. The small student can learn only some of them. It is
trained twice from the same cold start, on the same number of tokens: once on what the teacher writes without selection
(standard distillation), and once on what the student chose.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from genssd.distill.answers.intervals import paired_difference
from genssd.distill.demo.config import DemoConfig
from genssd.distill.demo.parts import CHUNK_OF_ARM, COLD_START, MAX_TOKENS, STEP, Arm, list_parts, load_pair
from genssd.distill.demo.processes import divide_threads, run_parts
from genssd.distill.evaluate.run import Evaluation
from genssd.distill.runs.journal import read_json, write_json, write_jsonl
from genssd.distill.runs.writing import remove_directory
from genssd.distill.small_pair.problems import STYLES, Problem, make_problems
from genssd.engine.common.errors import InputError
from genssd.engine.engine import Engine
from genssd.engine.search.selection import Selection

CAVEAT = (
    "The task is tuned to show the effect: styles change within a solution, the student can imitate only some, and the "
    "teacher prefers one that it cannot, which is also the shortest. One seed without controls is no proof. In the "
    "comparison over five seeds (docs/results.md, repeated by `genssd reproduce small`) random choices helped nothing; "
    "choosing the longest step, or the one that the teacher finds likeliest, could not be told from the student's "
    "choice. On a task in which the three prefer different steps only the student's choice helps (`genssd reproduce "
    "apart`, docs/results.md). How much selection gives elsewhere has to be measured there."
)


def run_demo(config: DemoConfig, screen: Console, progress: Console) -> Mapping[str, Any]:
    """Run everything, print to `screen`, write OUTPUT_DIR/demo.json and return what it holds."""
    started = time.monotonic()
    output_dir = Path(config.output_dir)
    _clear(output_dir)
    eval_file = output_dir / "eval.jsonl"
    write_jsonl(output_dir / "train.jsonl", _rows(make_problems(config.prompts, config.seed)))
    write_jsonl(eval_file, _rows(make_problems(config.eval_problems, config.seed + 1000, split="eval")))

    each, num_processes = divide_threads(config)
    engine = load_pair(each.threads)
    _show_steering(engine, config, screen)
    names = list_parts(config)
    results = run_parts(names, engine, each, num_processes, progress)
    before, arms = results.cold_start, results.list_arms(names)
    _show_results(before, arms, config, screen)
    seconds = time.monotonic() - started
    result = {
        "seconds": seconds,
        "config": dataclasses.asdict(config),
        "processes": num_processes,
        "cold_start": _report_fields(before),
        "arms": {arm.name: _arm_fields(arm) for arm in arms},
        "minus_standard": {
            arm.name: dataclasses.asdict(paired_difference(arm.evaluation.correct, arms[0].evaluation.correct))
            for arm in arms[1:]
        },
    }
    write_json(output_dir / "demo.json", result)
    screen.print(f"{seconds:.0f} s in all")
    return result


def _clear(output_dir: Path) -> None:
    """Remove the files of an earlier demo. Raises InputError when the directory holds anything else."""
    mark = output_dir / "run.json"
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not mark.exists() or read_json(mark).get("command") != "demo":
            raise InputError(f"{output_dir} is not empty and not of an earlier demo; choose another output_dir")
        for arm in (*CHUNK_OF_ARM, COLD_START.replace(" ", "-")):
            remove_directory(output_dir / arm)
    write_json(mark, {"command": "demo"})


def _rows(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"problem": problem.question, "answer": problem.answer} for problem in problems]


def _show_steering(engine: Engine, config: DemoConfig, screen: Console) -> None:
    """Print one problem round by round: the teacher's candidates and the one that the student keeps."""
    problem = make_problems(1, config.seed + 1)[0]
    (selection,) = engine.select_expand(
        [[{"role": "user", "content": problem.question}]],
        candidates=config.candidates,
        chunk=STEP,
        max_tokens=MAX_TOKENS,
        seed=config.seed,
    )
    screen.print(Text(f"\n{problem.question}", style="bold"))
    offer = f"The teacher offers {config.candidates} candidates per step"
    screen.print(f"{offer}; the student keeps the least surprising one.\n")
    screen.print(_steering_table(selection, engine))
    screen.print(
        f"answer {problem.answer}; {len(selection.best.token_ids)} tokens kept of {selection.tokens_sampled} sampled\n"
    )


def _steering_table(selection: Selection, engine: Engine) -> Table:
    table = Table("step", "candidate", "student ppl", "teacher ppl", "verdict", box=None, pad_edge=False)
    decode = engine.tokenizer("teacher").decode
    for record in selection.tree:
        teacher = math.exp(-float(record.teacher_logprob.mean()))
        table.add_row(
            str(record.round + 1),
            Text(decode(record.token_ids).strip()),
            f"{math.exp(-float(record.stats.logprob.mean())):.2f}",
            f"{teacher:.2f}",
            record.verdict,
            style="bold green" if record.verdict == "kept" else "dim",
        )
    return table


def _show_results(before: Evaluation, arms: Sequence[Arm], config: DemoConfig, screen: Console) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("training data", no_wrap=True)
    for header in ("kept", "sampled", "right", *STYLES):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("accuracy", no_wrap=True)
    table.add_row("(cold start)", *[""] * 6, str(before.accuracy))
    for arm in arms:
        table.add_row(
            arm.name,
            f"{arm.data.tokens_kept / 1000:.0f}k",
            f"{arm.data.tokens_sampled / 1000:.0f}k",
            f"{100 * arm.correct_fraction:.0f} %",
            *(f"{100 * arm.styles.get(style, 0.0):.0f} %" for style in STYLES),
            str(arm.evaluation.accuracy),
        )
    screen.print(table)
    screen.print(
        f"\nThe students' greedy accuracy on {config.eval_problems} held-out problems, with 95 % intervals. kept, "
        "sampled: teacher tokens. right: share of right answers in the data. spelled, jump, detour: styles of its "
        f"steps. {config.prompts} problems; every student is trained on {config.train_tokens:,} tokens."
    )
    standard = arms[0].evaluation.correct
    for arm in arms[1:]:
        screen.print(f"{arm.name} - standard: {paired_difference(arm.evaluation.correct, standard)}")
    screen.print(CAVEAT)


def _report_fields(evaluation: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(evaluation).items() if name != "correct"}


def _arm_fields(arm: Arm) -> dict[str, Any]:
    return {
        "tokens_kept": arm.data.tokens_kept,
        "tokens_sampled": arm.data.tokens_sampled,
        "correct_share": arm.correct_fraction,
        "mean_tokens": arm.mean_tokens,
        "styles": dict(arm.styles),
        "evaluation": _report_fields(arm.evaluation),
    }
