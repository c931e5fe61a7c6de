"""The memory of jobs with Qwen3 models on one GPU, and with SmolLM2 models on a CPU: tables of gsm8k.md and cpu.md.

The numbers are those of the project's own plan (engine/setup/memory_plan.py) and its estimate of a training
(distill/train/activations.py), which `genssd doctor` prints for models that are there.
"""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import torch

from genssd.distill.train.activations import BatchShape, estimate_training_bytes
from genssd.distill.train.config import TrainSettings
from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.parameters import count_cache_values
from genssd.engine.models.transformers_loading import make_empty_model
from genssd.engine.setup.memory_plan import PlannedModel, plan_memory

SHAPES = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}
"""Hidden size, feed-forward width, layers, query heads, and whether the head is the embedding, of each Qwen3 model."""
SMALL = {"135M": (576, 1536, 30, 9, 3), "360M": (960, 2560, 32, 15, 5), "1.7B": (2048, 8192, 24, 32, 32)}
"""Hidden size, feed-forward width, layers, query heads and heads of keys and values of each SmolLM2 model."""
PAIRS = (("8B", "0.6B"), ("8B", "1.7B"), ("14B", "1.7B"), ("32B", "4B"))
CARDS = (24, 48, 80)
"""Memory of a card in GiB; of it 1 GiB counts as taken by CUDA itself."""
STUDENTS = ("0.6B", "1.7B", "4B")
GIB, MIB = 1 << 30, 1 << 20
SEQUENCE = 1024 + 256 + 3 * 512
"""Tokens that a prompt of 256 tokens with a response of 1024 and four candidates of at most 512 holds at most."""


def write_config(directory: Path, size: str) -> Path:
    """Write the config.json of a Qwen3 model and return its directory."""
    hidden, inner, layers, heads, tied = SHAPES[size]
    config = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": hidden, "vocab_size": 151936,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "hidden_act": "silu", "attention_bias": False,
        "dtype": "bfloat16",
    }  # fmt: skip
    place = directory / size
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    return place


def count_parameters(directory: Path) -> int:
    """Return the number of parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in make_empty_model(directory).parameters())


def make_selection_table(directory: Path) -> list[str]:
    """Return the lines of the table of a selection: weights, and what the caches hold on each card."""
    lines = ["| teacher, student | weights | " + " | ".join(f"{card} GiB card" for card in CARDS) + " |"]
    lines.append("|---|---:|" + "---:|" * len(CARDS))
    device = torch.device("cuda")
    for sizes in PAIRS:
        models = {}
        for role, size in zip(("teacher", "student"), sizes, strict=True):
            place = write_config(directory, size)
            models[role] = PlannedModel(
                config=ModelConfig.load(place), dtype=torch.bfloat16, device=device,
                weight_bytes=2 * count_parameters(place), copied_bytes=0,
            )  # fmt: skip
        weights = " + ".join(f"{model.weight_bytes / GIB:.1f}" for model in models.values())
        cells = [_describe_card(models, card) for card in CARDS]
        lines.append(f"| Qwen3-{sizes[0]}, Qwen3-{sizes[1]} | {weights} GiB | {' | '.join(cells)} |")
    return lines


def _describe_card(models: dict[str, PlannedModel], card: int) -> str:
    free = (card - 1) * GIB
    if sum(model.weight_bytes for model in models.values()) > 0.95 * free:
        return "does not fit"
    with (
        patch("genssd.engine.setup.memory.available_bytes", lambda device: free),
        patch("genssd.engine.setup.memory_plan.available_bytes", lambda device: free),
    ):
        plan = plan_memory(models, memory_bytes=None, free_fraction=0.9, max_num_seqs=None, threads=1)
    return f"{plan.cache_tokens // 1000:,}k tokens, {plan.cache_tokens // SEQUENCE} prompts"


def make_training_table(directory: Path) -> list[str]:
    """Return the lines of the table of a training in bfloat16: about the memory of the student's training."""
    plain = TrainSettings(per_device_train_batch_size=4)
    checkpointed = TrainSettings(per_device_train_batch_size=4, gradient_checkpointing=True)
    lines = ["| student | 4 x 1280 tokens | with `--gradient-checkpointing` |", "|---|---:|---:|"]
    for size in STUDENTS:
        place = write_config(directory, size)
        cells = []
        for config in (plain, checkpointed):
            model = make_empty_model(place)
            batch = BatchShape.of_equal(config, length=1280, prompt=256)
            weights = sum(int(parameter.nbytes) for parameter in model.parameters())
            needed = weights + estimate_training_bytes(model, batch, config, bf16=True)
            cells.append(f"about {needed / GIB:.0f} GiB")
        lines.append(f"| Qwen3-{size} | {' | '.join(cells)} |")
    return lines


def write_small_config(directory: Path, size: str) -> Path:
    """Write the config.json of a SmolLM2 model and return its directory."""
    hidden, inner, layers, heads, kv_heads = SMALL[size]
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "vocab_size": 49152,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5, "rope_theta": 100_000, "hidden_act": "silu", "dtype": "bfloat16",
    }  # fmt: skip
    place = directory / f"small-{size}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(config))
    return place


def make_small_table(directory: Path) -> list[str]:
    """Return the lines of the table of SmolLM2 models: weights, and cache, in float32 and bfloat16."""
    lines = ["| model | weights, float32 | bfloat16 | cache of 1,000 tokens, float32 |", "|---|---:|---:|---:|"]
    for size in SMALL:
        place = write_small_config(directory, size)
        count = count_parameters(place)
        cache = 1000 * 4 * count_cache_values(ModelConfig.load(place))
        cells = (f"{4 * count / MIB:,.0f} MiB", f"{2 * count / MIB:,.0f} MiB", f"{cache / MIB:.0f} MiB")
        lines.append(f"| SmolLM2-{size} | {' | '.join(cells)} |")
    return lines
