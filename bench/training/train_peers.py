"""Peak memory and time per training step against TRL, on one machine, each program in its own process.

    python -m bench.training.train_peers [--rounds 3] [--json bench/results/train.json]

The model is a random Qwen3-class one (4 layers, width 256, vocabulary 32000, float32 on a CPU), trained on batches of 4
rows of 64 + 448 tokens: supervised fine-tuning against SFTTrainer, and generalized JSD from a teacher in memory (6
layers, width 384) against GKDTrainer with lmbda 0. The results list the first loss, the peak of resident memory, and
the median time of the steps after the second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

VOCABULARY, PROMPT, COMPLETION, BATCH, STEPS = 32000, 64, 448, 4, 8


def save_model(directory: Path, layers: int, width: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(layers)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    named = ["<unk>", "<eos>", "<pad>"]  # tokenizers would split a token that contains one of these
    vocabulary = {word: i for i, word in enumerate([*named, *(f"t{i}" for i in range(3, VOCABULARY))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(directory)


def save_rows(path: Path) -> None:
    """Write the training rows as JSON lines, with prompt and completion (SFT) and messages (GKD)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (BATCH * STEPS, PROMPT + COMPLETION - 1), generator=generator).tolist()
    with path.open("w") as file:
        for row in ids:
            words = [f"t{i}" for i in row]
            texts = " ".join(words[:PROMPT]) + " ", " ".join(words[PROMPT:])
            turns = [{"role": r, "content": t} for r, t in zip(("user", "assistant"), texts, strict=True)]
            file.write(json.dumps({"prompt": texts[0], "completion": texts[1], "messages": turns}) + "\n")


def read_peak_bytes() -> int:
    """Return the peak of resident memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def summarize(ends: list[float], losses: list[float], base: int) -> dict[str, Any]:
    """Return the median seconds per step, the peak memory, the memory before training, and the first loss."""
    steps = [b - a for a, b in pairwise(ends)][1:]
    return {"seconds": median(steps), "peak_bytes": read_peak_bytes(), "loaded_bytes": base, "first_loss": losses[0]}


def train_with_genssd(directory: str, kind: str) -> dict[str, Any]:
    from genssd.distill.train.config import TrainConfig
    from genssd.distill.train.trainer import run_train

    root, ends, losses = Path(directory), [], []
    teaching: dict[str, Any] = {}
    if kind == "jsd":
        teaching = {"teacher_model_name_or_path": str(root / "teacher"), "kd_ratio": 1.0, "kd_loss": "jsd", "beta": 0.5}
    config = TrainConfig(
        model_name_or_path=str(root / "student"), data=(str(root / "rows.jsonl"),),
        output_dir=str(root / f"ours-{kind}-{os.getpid()}"), per_device_train_batch_size=BATCH, max_steps=STEPS,
        lr_scheduler_type="constant", warmup_steps=0.0, logging_steps=1, **teaching,
    )  # fmt: skip
    base = read_peak_bytes()
    run_train(config, report=lambda p: (ends.append(time.perf_counter()), losses.append(p.loss)))  # type: ignore[func-returns-value]
    return summarize(ends, losses, base)


def train_with_trl(directory: str, kind: str) -> dict[str, Any]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    root = Path(directory)
    ends: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **options: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    settings: dict[str, Any] = {
        "output_dir": str(root / f"trl-{kind}-{os.getpid()}"), "per_device_train_batch_size": BATCH, "max_steps": STEPS,
        "lr_scheduler_type": "constant", "learning_rate": 1e-5, "logging_steps": 1, "report_to": "none",
        "use_cpu": True, "bf16": False, "save_strategy": "no", "max_length": None, "gradient_checkpointing": False,
    }  # fmt: skip
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    tokenizer: Any = AutoTokenizer.from_pretrained(root / "student")
    model: Any = AutoModelForCausalLM.from_pretrained(root / "student", dtype=torch.float32)
    base = read_peak_bytes()
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])
        trainer: Any = SFTTrainer(
            model=model, args=SFTConfig(**settings), train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
        )
    else:
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        data = Dataset.from_list([{"messages": row["messages"]} for row in rows])
        teacher = AutoModelForCausalLM.from_pretrained(root / "teacher", dtype=torch.float32)
        arguments = GKDConfig(**settings, lmbda=0.0, beta=0.5, temperature=1.0)
        trainer = GKDTrainer(
            model=model, teacher_model=teacher, args=arguments, train_dataset=data, processing_class=tokenizer,
            callbacks=[Clock()],
        )  # fmt: skip
    trainer.train()
    return summarize(ends, losses, base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with TemporaryDirectory() as directory:
        save_model(Path(directory) / "student", 4, 256)
        save_model(Path(directory) / "teacher", 6, 384)
        save_rows(Path(directory) / "rows.jsonl")
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for _ in range(options.rounds):
            for kind in ("sft", "jsd"):
                for name, run in (("genssd", train_with_genssd), ("trl", train_with_trl)):
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        runs.setdefault((kind, name), []).append(pool.apply(run, (directory, kind)))
    for (kind, name), runs_of_program in runs.items():
        row = {
            "kind": kind,
            "program": name,
            "seconds_per_step": round(median(run["seconds"] for run in runs_of_program), 3),
            "peak_mib": max(run["peak_bytes"] for run in runs_of_program) >> 20,
            "before_mib": max(run["loaded_bytes"] for run in runs_of_program) >> 20,
            "first_loss": runs_of_program[0]["first_loss"],
        }
        rows.append(row)
        print(row)
    if options.json:
        shape = {"vocabulary": VOCABULARY, "prompt": PROMPT, "completion": COMPLETION, "batch": BATCH}
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({**shape, **machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
