"""Time of a complete search with models of Qwen3-8B's and Qwen3-0.6B's shapes: the student chooses while 8B writes.

    python -m bench.engine.search_gpu [--prompts 64] [--max-tokens 512] [--chunk 256] [--json FILE]

Weights are random, in bf16: the work is that of real models, the words are not. Prompts have 256 tokens each, and no
response ends before its limit. Printed: tokens per second of the teacher, and from torch's profiler over a shorter
search the time in which the device is busy, the kernels that take most of it, and the gaps: the idle times, by the
kernels before and after them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench.support.device_gaps import kernels_of, measure_device_time
from transformers import Qwen3Config, Qwen3ForCausalLM

import genssd
from genssd import Chunk, Engine
from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.models.model import Decoder
from genssd.engine.setup.loading import LoadedModels
from genssd.engine.texts.text import Tokenizer

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
COMMON = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
SHAPES = {
    "teacher": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "student": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
}
TINY = {
    "vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def build_decoder(role: str) -> Decoder:
    """Return a decoder with random weights of the shape of a role, tiny on a CPU."""
    config = Qwen3Config(**({**COMMON, **SHAPES[role]} if GPU else TINY), tie_word_embeddings=role == "student" and GPU)
    torch.set_default_dtype(torch.bfloat16 if GPU else torch.float32)
    with torch.device(DEVICE):
        model: Any = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    with TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        shape = ModelConfig.load(Path(directory))
    return Decoder.from_tensors(shape, model.state_dict(), Path("random"), frozen=True)


class EndlessTokenizer(Tokenizer):
    """A tokenizer that knows no end of a response, so that every response is as long as its limit."""

    @property
    def end_token_ids(self) -> frozenset[int]:
        return frozenset()


def build_engine() -> Engine:
    """Return an engine over both models, with the tokenizer of the shipped pair."""
    directory = Path(genssd.__file__).parent / "distill" / "small_pair" / "teacher"
    tokenizers: Any = {role: EndlessTokenizer(directory) for role in SHAPES}
    decoders: Any = {role: build_decoder(role) for role in SHAPES}
    models = LoadedModels(
        directories={role: directory for role in tokenizers}, decoders=decoders, tokenizers=tokenizers
    )
    return Engine(models.open_resources(None if GPU else 1 << 28, 0.8, 256))


def run_search(engine: Engine, prompts: int, chunk: int, max_tokens: int, steps: list[int]) -> float:
    """Return the seconds of one search; the number of steps is appended."""
    generator = torch.Generator().manual_seed(max_tokens)
    largest = engine._resources.tokenizers["teacher"].largest_id
    ids = [torch.randint(3, largest, (256 if GPU else 16,), generator=generator).tolist() for _ in range(prompts)]
    before = engine.usage.sampled_tokens
    started = time.perf_counter()
    engine.select_expand(ids, candidates=4, chunk=Chunk(tokens=chunk, until=None), max_tokens=max_tokens, seed=0)
    if GPU:
        torch.cuda.synchronize()
    steps.append(engine.usage.sampled_tokens - before)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64 if GPU else 4)
    parser.add_argument("--chunk", type=int, default=256 if GPU else 8)
    parser.add_argument("--max-tokens", type=int, default=512 if GPU else 16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = build_engine()
    tokens: list[int] = []
    run_search(engine, options.prompts, 8, 16, tokens)  # compiles, and captures the graphs
    seconds = run_search(engine, options.prompts, options.chunk, options.max_tokens, tokens)
    row: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if GPU else "cpu", "prompts": options.prompts, "candidates": 4,
        "chunk": options.chunk, "max_tokens": options.max_tokens, "seconds": seconds,
        "teacher_tokens": tokens[-1], "teacher_tokens_per_second": tokens[-1] / seconds,
    }  # fmt: skip
    if GPU:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            profiled = run_search(engine, options.prompts, 32, 64, tokens)
        device = measure_device_time(kernels_of(profile))
        row["profiled_seconds"], row["device_seconds"], row["busy_seconds"] = (
            profiled,
            device.seconds,
            device.busy_seconds,
        )
        row["gaps"] = [dataclasses.asdict(gap) for gap in device.gaps[:16]]
        row["kernels"] = dict(list(device.kernels.items())[:16])
    print(json.dumps(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
