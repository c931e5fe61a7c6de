"""The parts of `genssd demo`: the student before any training, and each arm, which makes data, trains and evaluates.

No part needs another one's results, so that two processes can run them at the same time (processes.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from genssd.distill.console import report_training
from genssd.distill.demo.config import DemoConfig
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import Evaluation, run_evaluate
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.engines import load_engine
from genssd.distill.runs.journal import complete_rows
from genssd.distill.runs.progress import Progress
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.distill.select.summary import SelectSummary
from genssd.distill.small_pair.problems import Problem, detect_style, make_problems, solves
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling

PAIR = Path(__file__).parents[1] / "small_pair"
STEP = Chunk(tokens=1, until="\n", limit=64)  # one line of a solution
MAX_TOKENS = 192
SOLUTION = Chunk(tokens=MAX_TOKENS, until=None)
MEMORY_BYTES = 1 << 29
COLD_START = "cold start"
"""Name of the part that evaluates the student before its training."""
CHUNK_OF_ARM = {"standard": STEP, "selected": STEP, "post-hoc": SOLUTION}
OpenLine = Callable[[str], AbstractContextManager[Progress]]
"""Function that begins to report something under a title."""


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


def list_parts(config: DemoConfig) -> list[str]:
    """Return the names of the parts: the arms in the order of the table, after the student before its training."""
    return [COLD_START, *(name for name in CHUNK_OF_ARM if config.post_hoc or name != "post-hoc")]


def load_pair(threads: int | None) -> Engine:
    """Load both models of the small pair."""
    options = EngineOptions(dtype="float32", memory_bytes=MEMORY_BYTES, threads=threads)
    return load_engine(options, teacher=str(PAIR / "teacher"), student=str(PAIR / "student"))


def run_part(name: str, engine: Engine, config: DemoConfig, open_line: OpenLine) -> Evaluation | Arm:
    """Run one part and return its results. config: with the number of threads of this process."""
    if name == COLD_START:
        return _evaluate(PAIR / "student", name, config, open_line)
    return _run_arm(name, engine, config, open_line)


def _run_arm(name: str, engine: Engine, config: DemoConfig, open_line: OpenLine) -> Arm:
    """Make the data of one arm, train the student on it, and evaluate the student."""
    output_dir = Path(config.output_dir)
    problems = make_problems(config.prompts, config.seed)
    select = SelectConfig(
        teacher=str(PAIR / "teacher"),
        student=str(PAIR / "student"),
        data=str(output_dir / "train.jsonl"),
        output_dir=str(output_dir / name),
        # one candidate per step is standard distillation; one step for the whole solution is post-hoc best-of-N
        candidates=1 if name == "standard" else config.candidates,
        chunk=CHUNK_OF_ARM[name],
        sampling=Sampling(),
        max_tokens=MAX_TOKENS,
        seed=config.seed,
        threads=config.threads,
    )
    with open_line(f"{name}, the teacher writes") as line:
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
    with open_line(f"{name}, the student learns") as line:
        run_train(train, report_training(line))
    evaluation = _evaluate(output_dir / name / "student", name, config, open_line)
    return _describe(name, data, problems, evaluation)


def _evaluate(model: Path, name: str, config: DemoConfig, open_line: OpenLine) -> Evaluation:
    output_dir = Path(config.output_dir)
    evaluate = EvaluateConfig(
        model=str(model),
        data=str(output_dir / "eval.jsonl"),
        output_dir=str(output_dir / name.replace(" ", "-") / "evaluation"),
        max_tokens=MAX_TOKENS,
        dtype="float32",
        memory_bytes=MEMORY_BYTES,
        threads=config.threads,
    )
    with open_line(f"{name}, examination") as line:
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
