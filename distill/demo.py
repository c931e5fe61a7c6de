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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from genssd.distill.answers.intervals import paired_difference
from genssd.distill.console import ProgressLine, report_training
from genssd.distill.demo_config import DemoConfig
from genssd.distill.evaluate_config import EvaluateConfig
from genssd.distill.evaluating import Evaluation, run_evaluate
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.engines import load_engine
from genssd.distill.runs.journal import complete_rows, read_json, write_json, write_jsonl
from genssd.distill.runs.writing import remove_directory
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.distill.select.summary import SelectSummary
from genssd.distill.small_pair.problems import STYLES, Problem, detect_style, make_problems, solves
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling
from genssd.engine.search.selection import Selection

PAIR = Path(__file__).with_name("small_pair")
STEP = Chunk(tokens=1, until="\n", limit=64)  # one line of a solution
MAX_TOKENS = 192
SOLUTION = Chunk(tokens=MAX_TOKENS, until=None)
MEMORY_BYTES = 1 << 29
CAVEAT = (
    "The task is tuned to show the effect: styles change within a solution, the student can imitate only some, and the "
    "teacher prefers one that it cannot, which is also the shortest. One seed without controls is no proof. In the "
    "comparison over five seeds (docs/results.md, repeated by `genssd reproduce small`) random choices helped nothing; "
    "choosing the longest step, or the one that the teacher finds likeliest, could not be told from the student's "
    "choice. How much selection gives elsewhere has to be measured there."
)
CHUNK_OF_ARM = {"standard": STEP, "selected": STEP, "post-hoc": SOLUTION}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to make training data, with the data and the trained student's results."""

    name: str
    data: SelectSummary
    correct_fraction: float
    """Fraction of the kept trajectories whose answer is right."""
    mean_tokens: float
    styles: Mapping[str, float]
    evaluation: Evaluation


def run_demo(config: DemoConfig, screen: Console, progress: Console) -> Mapping[str, Any]:
    """Run everything, print to `screen`, write OUTPUT_DIR/demo.json and return what it holds."""
    started = time.monotonic()
    output_dir = Path(config.output_dir)
    _clear(output_dir)
    train_problems = make_problems(config.prompts, config.seed)
    eval_file = output_dir / "eval.jsonl"
    write_jsonl(output_dir / "train.jsonl", _rows(train_problems))
    write_jsonl(eval_file, _rows(make_problems(config.eval_problems, config.seed + 1000, split="eval")))

    options = EngineOptions(dtype="float32", memory_bytes=MEMORY_BYTES, threads=config.threads)
    engine = load_engine(options, teacher=str(PAIR / "teacher"), student=str(PAIR / "student"))
    _show_steering(engine, config, screen)
    before = _evaluate(PAIR / "student", "cold start", config, output_dir, progress)
    # one candidate per step is standard distillation; one step for the whole solution is post-hoc best-of-N
    arms = [
        _run_arm(name, 1 if name == "standard" else config.candidates, chunk, engine, config, train_problems, progress)
        for name, chunk in CHUNK_OF_ARM.items()
        if config.post_hoc or name != "post-hoc"
    ]
    _show_results(before, arms, config, screen)
    seconds = time.monotonic() - started
    result = {
        "seconds": seconds,
        "config": dataclasses.asdict(config),
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
        for arm in (*CHUNK_OF_ARM, "cold-start"):
            remove_directory(output_dir / arm)
    write_json(mark, {"command": "demo"})


def _rows(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"problem": problem.question, "answer": problem.answer} for problem in problems]


def _run_arm(
    name: str,
    candidates: int,
    chunk: Chunk,
    engine: Engine,
    config: DemoConfig,
    problems: Sequence[Problem],
    progress: Console,
) -> Arm:
    """Make the data of one arm, train the student on it, and evaluate the student."""
    output_dir = Path(config.output_dir)
    select = SelectConfig(
        teacher=str(PAIR / "teacher"),
        student=str(PAIR / "student"),
        data=str(output_dir / "train.jsonl"),
        output_dir=str(output_dir / name),
        candidates=candidates,
        chunk=chunk,
        sampling=Sampling(),
        max_tokens=MAX_TOKENS,
        seed=config.seed,
        threads=config.threads,
    )
    with ProgressLine(f"{name}, the teacher writes", progress) as line:
        data = run_select(select, engine, line)
    train = TrainConfig(
        model_name_or_path=str(PAIR / "student"),
        data=(str(data.path),),
        output_dir=str(output_dir / name / "student"),
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        max_train_tokens=config.train_tokens,
        warmup_steps=0.05,
        seed=config.seed,
        threads=config.threads,
    )
    with ProgressLine(f"{name}, the student learns", progress) as line:
        run_train(train, report_training(line))
    evaluation = _evaluate(output_dir / name / "student", name, config, output_dir, progress)
    return _describe(name, data, problems, evaluation)


def _evaluate(model: Path, name: str, config: DemoConfig, output_dir: Path, progress: Console) -> Evaluation:
    evaluate = EvaluateConfig(
        model=str(model),
        data=str(output_dir / "eval.jsonl"),
        output_dir=str(output_dir / name.replace(" ", "-") / "evaluation"),
        max_tokens=MAX_TOKENS,
        dtype="float32",
        memory_bytes=MEMORY_BYTES,
        threads=config.threads,
    )
    with ProgressLine(f"{name}, examination", progress) as line:
        return run_evaluate(evaluate, report=line)


def _describe(name: str, data: SelectSummary, problems: Sequence[Problem], evaluation: Evaluation) -> Arm:
    texts = {row["index"]: row["messages"][-1]["content"] for row, _ in complete_rows(data.path)}
    styles = Counter(style for text in texts.values() for step in text.split("\n") if (style := detect_style(step)))
    right = sum(solves(problems[i], text) for i, text in texts.items())
    return Arm(
        name=name,
        data=data,
        correct_fraction=right / len(texts),
        mean_tokens=data.tokens_kept / len(texts),
        styles={style: count / styles.total() for style, count in styles.most_common()},
        evaluation=evaluation,
    )


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
