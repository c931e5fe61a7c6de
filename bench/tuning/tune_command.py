"""Run `genssd tune` on this GPU for the shapes of Qwen3-8B and Qwen3-0.6B, and check what the kernels then compute.

    python -m bench.tuning.tune_command --json FILE [--seconds 110]

Writes one JSON line per line of the command, then the tune file's entries, then one line per model: whether rows have
the same bits alone and among others with deterministic=True, and the time of scoring and drawing with the shipped
configurations, the deterministic and the fastest ones, in microseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from genssd.distill.tune.config import TuneConfig
from genssd.distill.tune.run import run_tune
from genssd.kernels import tune_file, tuned
from genssd.kernels.candidates_triton import head_inputs
from genssd.kernels.gpu_timing import captured_seconds
from genssd.kernels.logprob import linear_logprob
from genssd.kernels.sampling import linear_sample

VOCABULARY = 151936
WIDTHS = {"8b": 4096, "0.6b": 1024}
ROWS = (1, 16, 64, 128, 256, 512, 2048)


def write_config(directory: Path, width: int) -> str:
    """Write the config.json of a Qwen3 model of this width and return its directory."""
    directory.mkdir()
    fields = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": width, "vocab_size": VOCABULARY,
        "intermediate_size": 3 * width, "num_hidden_layers": 28, "num_attention_heads": 32 if width > 2048 else 16,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(fields))
    return str(directory)


def check_model(name: str, width: int, file: Path, write: Callable[..., None]) -> None:
    """Compare bits, and time scoring and drawing in every mode."""
    hidden, weight = head_inputs(torch.device("cuda", 0), torch.bfloat16, VOCABULARY, width)
    target = torch.arange(len(hidden), device="cuda")
    score = {n: linear_logprob(hidden[:n], weight, target[:n], checked=False) for n in ROWS}
    draw = {n: linear_sample(hidden[:n], weight, target[:n], checked=False) for n in ROWS if n <= 512}
    equal = all(torch.equal(s.logprob[:1], score[1].logprob) and torch.equal(s.rank[:1], score[1].rank)
                for s in score.values())  # fmt: skip
    equal = equal and all(torch.equal(d.logprob[:1], draw[1].logprob) for d in draw.values())
    write(model=name, bits_of_a_row_are_equal=equal)
    for rows in ROWS[1:]:
        row: dict[str, Any] = {"model": name, "rows": rows}
        h, t = hidden[:rows], target[:rows]
        operators: dict[str, Callable[[], object]] = {
            "score": functools.partial(linear_logprob, h, weight, t, checked=False),
            "draw": functools.partial(linear_sample, h, weight, t, checked=False),
        }
        for mode in ("shipped", "deterministic", "fastest"):
            os.environ[tune_file.FILE_VARIABLE] = str(file if mode != "shipped" else file.with_name("missing.json"))
            tuned.forget()
            with tuned.launch_mode(deterministic=mode != "fastest"):
                for operator, run in operators.items():
                    row[f"{operator}_{mode}_us"] = 1e6 * captured_seconds([run], repeats=3, per_graph=3)
        write(**row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("tune.jsonl"), help="file of the lines")
    parser.add_argument("--seconds", type=float, default=110.0, help="TuneConfig.seconds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tuning needs a GPU")
    started = time.perf_counter()
    with options.json.open("w") as lines, tempfile.TemporaryDirectory() as directory:

        def write(**row: Any) -> None:
            print(json.dumps(row), f"[{time.perf_counter() - started:.0f} s]", flush=True)
            lines.write(json.dumps(row) + "\n")
            lines.flush()

        file = Path(directory) / "tune.json"
        os.environ[tune_file.FILE_VARIABLE] = str(file)
        teacher, student = (write_config(Path(directory) / name, width) for name, width in WIDTHS.items())
        config = TuneConfig(teacher=teacher, student=student, seconds=options.seconds)
        run_tune(config, report=lambda line: write(line=line))
        write(card=torch.cuda.get_device_name(), tuning_s=time.perf_counter() - started)
        for _, problem, entry in tune_file.read_entries(file):
            write(**dataclasses.asdict(problem), **dataclasses.asdict(entry))
        for name, width in WIDTHS.items():
            check_model(name, width, file, write)


if __name__ == "__main__":
    main()
