"""Time of a complete decode step of many branches after one long prefix, against transformers and the memory's limit.

    python -m bench.engine.decode_step [--branches 64] [--prefix 4096 16384] [--json bench/results/decode_step.json]

On a GPU the model is a random one of Qwen3-8B's shape in bf16; on a CPU it is tiny, which only checks this program. A
step is the forward pass for one token of every branch, and drawing the next tokens, which the host reads. Its floor is
the time in which the device copies as many bytes as the weights and the distinct keys and values have. transformers
runs its own forward pass over a cache that repeats the prefix for every branch, where that cache fits, and then the
same draw. gaps: the fraction of a step's time in which the device runs no kernel, from torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench.support.device_limits import DeviceLimits, measure_device_limits, synchronize
from torch import Tensor
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.models.model import Decoder
from genssd.engine.models.paged_runner import PagedRunner
from genssd.engine.models.pages import PagePool
from genssd.engine.models.pending_read import PendingRead
from genssd.kernels.sampling import linear_sample

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
PAGE = 64 if GPU else 16
QWEN3_8B = {
    "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
TINY = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip

Step = Callable[[list[int]], list[int]]


def build_models() -> tuple[Any, Decoder]:
    """Return transformers' model and genssd's decoder, which use the same weight tensors."""
    config = Qwen3Config(**(QWEN3_8B if GPU else TINY), max_position_embeddings=40960, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        reference: Any = Qwen3ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    with TemporaryDirectory() as directory:
        config.save_pretrained(directory)
        shape = ModelConfig.load(Path(directory))
    decoder = Decoder.from_tensors(shape, reference.state_dict(), Path("random"))
    for name, part in decoder.stacked().items():
        reference.get_parameter(name).data = part
    return reference, decoder


def draw(hidden: Tensor, head: Tensor) -> list[int]:
    """Take the most likely token of every row of hidden states."""
    keys = torch.arange(len(hidden), device=hidden.device)
    tokens: list[int] = linear_sample(hidden, head, keys, temperature=0.0).tokens.tolist()
    return tokens


def genssd_steps(decoder: Decoder, prompt: list[int], branches: int, steps: int) -> tuple[Step, list[int]]:
    """Return genssd's decode step of branches after a prompt, and the first token.

    As in a search, the next forward pass is queued before the host reads the tokens that begin it.
    """
    pages = len(prompt) // PAGE + branches * (steps // PAGE + 3) + 2
    runner = PagedRunner("teacher", Path("random"), decoder, PagePool.for_model(decoder, pages, PAGE))
    trunk = runner.tree.root()
    (hidden,) = runner.extend([trunk], [prompt])
    paths = [trunk, *(runner.tree.fork(trunk) for _ in range(branches - 1))]
    first = draw(hidden[-1:], decoder.head.weight)
    states = [torch.cat(runner.extend(paths, [first] * branches))]

    def step(_: list[int]) -> list[int]:
        keys = torch.arange(branches, device=DEVICE)
        drawn = linear_sample(states[0], decoder.head.weight, keys, temperature=0.0, checked=False).tokens
        arriving = PendingRead(drawn)
        states[0] = runner.run(runner.prepare(paths, [1] * branches), drawn)
        return arriving.tolist()

    return step, first


def transformers_steps(model: Any, prompt: list[int], branches: int) -> tuple[Step, list[int]]:
    """Return transformers' decode step of branches after a prompt, and the first token."""
    cache = DynamicCache()
    for start in range(0, len(prompt), 1024):
        ids = torch.tensor([prompt[start : start + 1024]], device=DEVICE)
        hidden = model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state
    cache.batch_repeat_interleave(branches)

    def step(tokens: list[int]) -> list[int]:
        ids = torch.tensor(tokens, device=DEVICE)[:, None]
        states = model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state
        return draw(states[:, -1], model.lm_head.weight)

    return step, draw(hidden[0, -1:], model.lm_head.weight)


def timed(step: Step, tokens: list[int], steps: int) -> tuple[float, list[int]]:
    """Return the seconds of a step, after three that are not counted, and the last tokens.

    Nothing waits for the device between two steps but the reading of the tokens.
    """
    for _ in range(3):
        tokens = step(tokens)
    synchronize(DEVICE)
    started = time.perf_counter()
    for _ in range(steps):
        tokens = step(tokens)
    synchronize(DEVICE)
    return (time.perf_counter() - started) / steps, tokens


def idle_fraction(step: Step, tokens: list[int]) -> float:
    """Return the fraction of three steps' time, from the first kernel to the last, in which no kernel runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            tokens = step(tokens)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy, covered_until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return 1 - busy / (covered_until - spans[0][0])


def measure(
    reference: Any, decoder: Decoder, limits: DeviceLimits, prefix: int, branches: int, steps: int
) -> dict[str, Any]:
    prompt = torch.randint(0, decoder.config.vocab_size, (prefix,), generator=torch.Generator().manual_seed(0)).tolist()
    weights = sum(p.nbytes for name, p in reference.named_parameters() if "embed_tokens" not in name)
    unique = (prefix + branches * steps // 2) * decoder.kv_bytes_per_token
    row: dict[str, Any] = {"branches": branches, "prefix": prefix, "floor_ms": 1e3 * (weights + unique) / limits.bytes}
    step, first = genssd_steps(decoder, prompt, branches, steps + 6)
    seconds, tokens = timed(step, first * branches, steps)
    row["genssd_ms"] = 1e3 * seconds
    row["share_of_floor"] = row["floor_ms"] / row["genssd_ms"]
    if GPU:
        row["genssd_gaps"] = idle_fraction(step, tokens)
    del step
    try:
        step, reference_first = transformers_steps(reference, prompt, branches)
        reference_seconds, reference_tokens = timed(step, reference_first * branches, steps)
    except torch.OutOfMemoryError:
        return row | {"transformers": "out of memory"}
    row["transformers_ms"] = 1e3 * reference_seconds
    row["same_tokens"] = sum(a == b for a, b in zip(tokens, reference_tokens, strict=True)) / branches
    if not GPU:
        assert row["same_tokens"] == 1, "the models disagree"
    return row


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--branches", type=int, default=64 if GPU else 4)
    parser.add_argument("--prefix", type=int, nargs="+", default=[4096, 16384] if GPU else [100])
    parser.add_argument("--steps", type=int, default=32 if GPU else 8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    limits = measure_device_limits(DEVICE, DTYPE)
    reference, decoder = build_models()
    rows = []
    for prefix in options.prefix:
        rows.append(measure(reference, decoder, limits, prefix, options.branches, options.steps))
        print(rows[-1], flush=True)
    if options.json:
        machine = {"device": torch.cuda.get_device_name() if GPU else "cpu", "torch": torch.__version__}
        options.json.write_text(json.dumps({**machine, "copy_gbps": limits.bytes / 1e9, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
