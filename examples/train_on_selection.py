"""Select trajectories, train the student on them, and measure it before and after.

    python examples/train_on_selection.py [OUTPUT_DIR]

The same as `genssd select`, `genssd train` and `genssd evaluate`, as Python calls: every command is a config dataclass
and a function. On the small pair that ships with genssd; `make demo` is the full-sized experiment.
"""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path

from genssd import Chunk
from genssd.distill.evaluate.config import EvaluateConfig
from genssd.distill.evaluate.run import run_evaluate
from genssd.distill.select.config import SelectConfig
from genssd.distill.select.run import run_select
from genssd.distill.small_pair.problems import make_problems
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.trainer import run_train

PAIR = files("genssd.distill.small_pair")
TEACHER, STUDENT = str(PAIR / "teacher"), str(PAIR / "student")
MAX_TOKENS = 192
MEMORY_BYTES = 1 << 28


def write_problems(path: Path, count: int, seed: int) -> str:
    rows = [{"question": p.question, "answer": p.answer} for p in make_problems(count, seed)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def accuracy(model: str, data: str, output_dir: Path) -> str:
    config = EvaluateConfig(
        model=model, data=data, output_dir=str(output_dir), max_tokens=MAX_TOKENS, memory_bytes=MEMORY_BYTES
    )
    return str(run_evaluate(config).accuracy)


def main(output_dir: str = "runs/example", problems: int = 64, max_steps: int = 20) -> None:
    base = Path(output_dir)
    base.mkdir(parents=True, exist_ok=True)
    test_data = write_problems(base / "test.jsonl", max(4, problems // 4), seed=1)
    select = SelectConfig(
        teacher=TEACHER,
        student=STUDENT,
        data=write_problems(base / "problems.jsonl", problems, seed=0),
        output_dir=str(base / "select"),
        candidates=4,
        chunk=Chunk(tokens=1, until="\n", limit=64),
        max_tokens=MAX_TOKENS,
        memory_bytes=MEMORY_BYTES,
    )
    selected = run_select(select)
    print(f"{selected.tokens_kept:,} tokens kept of {selected.tokens_sampled:,} sampled: {selected.path}")
    train = TrainConfig(
        model_name_or_path=STUDENT,
        data=(str(selected.path),),
        output_dir=str(base / "train"),
        learning_rate=2e-3,
        max_steps=max_steps,
        per_device_train_batch_size=16,
    )
    trained = run_train(train)
    print(f"{trained.steps} steps, last loss {trained.loss:.3f}")
    print(f"accuracy before {accuracy(STUDENT, test_data, base / 'before')}")
    print(f"accuracy after  {accuracy(train.output_dir, test_data, base / 'after')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
