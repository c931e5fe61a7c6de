"""What every signal likes, before any training: how often the teacher writes each style, how long, and how likely.

The teacher answers the problems that no arm is trained or tested on; its responses are cut into lines, and both models'
log-probabilities of every step are averaged by style. A choice among independent steps then says which style each
signal would pick, whatever the search around it; and the fraction of steps that the cold start would finish rightly
says how well it knows a style already.

OUTPUT_DIR/styles/WORLD/rows/          the teacher's responses
OUTPUT_DIR/styles/WORLD/styles.json    what was measured
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from genssd.distill.reproduce.arms import SHIPPED
from genssd.distill.reproduce.worlds import Pair, ProblemFiles, Task
from genssd.distill.runs.journal import write_json
from genssd.distill.runs.progress import Progress
from genssd.distill.select.generate import run_generate
from genssd.distill.select.generate_config import GenerateConfig
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.texts.text import Tokenizer

STYLES_FILE: Final = "styles.json"
RESPONSES: Final = 8
"""Number of responses to each problem."""
DRAWS: Final = 4000
"""Number of choices that are drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a response of the teacher."""

    style: str
    tokens: int
    teacher: float
    """Log-probability under the teacher, nats."""
    student: float
    """Log-probability under the cold start, nats."""
    right: bool
    """Whether each digit of the step is the cold start's most likely token there; the first token is left out."""


Signal = Callable[[Step], float]
SIGNALS: Final[Mapping[str, Signal]] = {
    "longest": lambda step: step.tokens,
    "shortest": lambda step: -step.tokens,
    "teacher": lambda step: step.teacher / step.tokens,
    "student": lambda step: step.student / step.tokens,
}
"""Values by which a search chooses among steps, higher ones first, by name; the last two are means over tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StyleMeasure:
    """Means over the steps of one style."""

    style: str
    steps: int
    frequency: float
    """Fraction of all steps."""
    tokens: float
    teacher: float
    """Log-probability under the teacher per token, nats: the mean over steps of each step's mean."""
    student: float
    """Log-probability under the cold start per token, nats: the mean over steps of each step's mean."""
    teacher_sum: float
    """Log-probability of a step under the teacher, nats."""
    student_sum: float
    student_right: float
    """Fraction of steps that the cold start would write rightly if it began them so: of `Step.right`."""
    chosen: Mapping[str, float]
    """Fraction of choices among as many independent steps as a search has candidates, by signal."""


def measure_styles(
    task: Task, pair: Pair, files: ProblemFiles, directory: Path, candidates: int, report: Progress
) -> None:
    """Measure the styles of a task, unless that is done, and write styles.json into a directory."""
    path = directory / STYLES_FILE
    if not path.exists():
        config = GenerateConfig(
            teacher=str(pair.teacher), student=str(pair.student), data=str(files.calibration), n=RESPONSES,
            sampling=task.sampling, max_tokens=task.max_tokens, output_dir=str(directory / "rows"), resume=True,
            dtype=task.dtype, threads=task.threads, memory_bytes=task.memory_bytes,
        )  # fmt: skip
        summary = run_generate(config, report=report.within("styles"))
        rows = [json.loads(line) for line in summary.path.read_text(encoding="utf-8").splitlines()]
        steps = list(_read_steps(rows, task, pair))
        measured = [dataclasses.asdict(one) for one in summarise(steps, candidates)]
        write_json(path, {"candidates": candidates, "styles": measured})


def read_styles(directory: Path) -> dict[str, list[StyleMeasure]]:
    """Return what was measured in every world, in order of frequency; directory: the one with the worlds."""
    paths = sorted(directory.glob(f"*/{STYLES_FILE}"), key=lambda path: (path.parent.name != SHIPPED, path))
    return {path.parent.name: _read(path) for path in paths}


def _read(path: Path) -> list[StyleMeasure]:
    return [StyleMeasure(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))["styles"]]


def summarise(steps: Sequence[Step], candidates: int) -> list[StyleMeasure]:
    """Return the means by style, the most frequent style first. candidates: number of steps in one choice."""
    rng = random.Random("styles")
    draws = [rng.choices(steps, k=candidates) for _ in range(DRAWS)] if steps else []
    chosen = {name: [max(draw, key=signal).style for draw in draws] for name, signal in SIGNALS.items()}
    by_style: dict[str, list[Step]] = {}
    for step in steps:
        by_style.setdefault(step.style, []).append(step)
    ordered = sorted(by_style.items(), key=lambda item: -len(item[1]))
    return [
        StyleMeasure(
            style=style,
            steps=len(own),
            frequency=len(own) / len(steps),
            tokens=_mean(own, lambda step: step.tokens),
            teacher=_mean(own, SIGNALS["teacher"]),
            student=_mean(own, SIGNALS["student"]),
            teacher_sum=_mean(own, lambda step: step.teacher),
            student_sum=_mean(own, lambda step: step.student),
            student_right=_mean(own, lambda step: step.right),
            chosen={name: styles.count(style) / DRAWS for name, styles in chosen.items()},
        )
        for style, own in ordered
    ]


def _mean(steps: Sequence[Step], value: Signal) -> float:
    return sum(map(value, steps)) / len(steps)


def _read_steps(rows: Sequence[Mapping[str, Any]], task: Task, pair: Pair) -> Iterator[Step]:
    """Yield the steps of responses; a line that is no step, such as the answer, is left out."""
    tokenizer = Tokenizer(locate(str(pair.student)))
    model = AutoModelForCausalLM.from_pretrained(pair.student, dtype=torch.float32).eval()
    for row in rows:
        for response in (row, *row["others"]):
            ids = response["completion_ids"]
            pieces = [tokenizer.decode([token]) for token in ids]
            student, is_likeliest = score(model, row["student_prompt_ids"], ids)
            for start, end in find_lines(pieces):
                style = task.find_style(tokenizer.decode(ids[start:end]).rstrip("\n"))
                if style is not None:
                    yield Step(
                        style=style,
                        tokens=end - start,
                        teacher=sum(response["teacher_logprobs"][start:end]),
                        student=sum(student[start:end]),
                        right=all(is_likeliest[i] for i in range(start + 1, end) if pieces[i].strip().isdigit()),
                    )


def find_lines(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the first token of every line of a text, and the one after its last, whose piece holds the line's end."""
    start = 0
    for place, piece in enumerate(pieces, start=1):
        if "\n" in piece or place == len(pieces):
            yield start, place
            start = place


@torch.inference_mode()
def score(model: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> tuple[list[float], list[bool]]:
    """Return the log-probability of every token of a completion in nats, and whether it is the most likely one."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    target_T = ids[0, len(prompt_ids) :]
    logprobs_TV = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    values: list[float] = logprobs_TV.gather(1, target_T[:, None])[:, 0].tolist()
    is_likeliest: list[bool] = (logprobs_TV.argmax(-1) == target_T).tolist()
    return values, is_likeliest
