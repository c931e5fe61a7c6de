"""A training of a random model in a process of its own, and the memory that it takes: see `measure`.

python -m support.training_memory '{"attention": "sdpa", ...}'      prints the estimated and the real bytes
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from genssd.distill.train.activations import BatchShape, estimate_training_bytes
from genssd.distill.train.batches import TokenRow, build_token_batch
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.loss_options import LossOptions
from genssd.distill.train.losses import CompletionTokens, Head, compute_loss
from genssd.distill.train.models import compute_completion_states


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCase:
    """A model and its batch."""

    attention: str
    hidden_size: int
    layers: int
    feed_forward: int
    vocabulary: int
    rows: int
    length: int
    prompt: int = 8
    gradient_checkpointing: bool = False


def measure(cases: Sequence[TrainingCase]) -> list[tuple[int, int]]:
    """Return the estimated and the real bytes that two steps of each take besides the weights, in a new process each.

    Its allocator gives freed tensors back to the system at once, as it does those of 32 MiB and more everywhere.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    arguments = [json.dumps(dataclasses.asdict(case)) for case in cases]
    command = [sys.executable, "-m", "support.training_memory", *arguments]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=True
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def read_status(name: str) -> int:
    """Return a size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def build_model(case: TrainingCase) -> torch.nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=case.hidden_size,
            num_hidden_layers=case.layers,
            intermediate_size=case.feed_forward,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=case.vocabulary,
            max_position_embeddings=case.length,
            attn_implementation=case.attention,
        )
    )


def take_steps(case: TrainingCase, model: torch.nn.Module) -> None:
    if case.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = tuple(i % case.vocabulary for i in range(case.length))
    batch = build_token_batch([TokenRow(ids, case.prompt)] * case.rows, "pad", 0)
    weights = torch.ones(len(batch.target))
    tokens = CompletionTokens(target_M=batch.target, weight_M=weights, rejected_M=None, on_policy=False)
    for _ in range(2):
        head = Head(compute_completion_states(model, batch), model.get_output_embeddings().weight)
        compute_loss(LossOptions(), head, tokens, None, special_ids=()).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main(case: TrainingCase) -> None:
    model = build_model(case)
    before = read_status("VmRSS")
    take_steps(case, model)
    config = TrainConfig(
        model_name_or_path="student", data=("data",), gradient_checkpointing=case.gradient_checkpointing
    )
    shape = BatchShape(rows=case.rows, length=case.length, completion_tokens=case.rows * (case.length - case.prompt))
    print(json.dumps([estimate_training_bytes(model, shape, config, bf16=False), read_status("VmHWM") - before]))


if __name__ == "__main__":
    for text in sys.argv[1:]:
        child = os.fork()  # with the imports of this one
        if not child:
            main(TrainingCase(**json.loads(text)))
            sys.stdout.flush()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
