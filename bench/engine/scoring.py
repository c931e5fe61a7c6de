"""Time and memory of scoring many traces: the engine of `genssd score` against transformers with full logits.

    python -m bench.engine.scoring [--traces 5000] [--tokens 2048] [--json bench/results/pool.json]

The model is a random Llama-class one (by default 4 layers, width 256, vocabulary 32000; float32 on a CPU, bf16 on a
GPU); prompts have 64 ids and several responses each. Both programs compute the mean log-probability and rank of every
response; they alternate on one machine. Each runs in a process of its own, so the peak of resident memory is its own.
transformers gets batches of `--batch` traces of equal length, so it computes no padding. The values are compared before
the times are reported.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PROMPT, PER_PROMPT = 64, 4


def make_traces(count: int, tokens: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Return random (prompt, response) pairs of token ids; PER_PROMPT consecutive pairs have the same prompt."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, vocabulary, (-(-count // PER_PROMPT), PROMPT), generator=generator)
    responses = torch.randint(0, vocabulary, (count, tokens), generator=generator)
    return [(prompts[i // PER_PROMPT].tolist(), responses[i].tolist()) for i in range(count)]


def save_model(directory: Path, layers: int, width: int, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 64, max_position_embeddings=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16 if GPU else torch.float32).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1").save_pretrained(directory)


def read_peak_bytes() -> int:
    """Return the peak memory of this process: the allocator's on a GPU, else resident memory (Linux)."""
    if GPU:
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def score_with_genssd(directory: str, count: int, tokens: int, vocabulary: int, batch: int) -> dict[str, Any]:
    from genssd import Engine

    engine = Engine.from_pretrained(student=directory, memory_bytes=256 << 20)
    traces = make_traces(count, tokens, vocabulary)
    engine.score([traces[0][0]], [traces[0][1][:64]])
    started, values = time.perf_counter(), []
    for start in range(0, count, batch):
        part = traces[start : start + batch]
        for stats in engine.score([prompt for prompt, _ in part], [response for _, response in part]):
            values.append([float(stats.logprob.mean()), float(stats.rank.float().mean())])
    return {"seconds": time.perf_counter() - started, "peak_bytes": read_peak_bytes(), "values": values}


@torch.inference_mode()
def score_with_transformers(directory: str, count: int, tokens: int, vocabulary: int, batch: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", device_map=DEVICE)
    traces = make_traces(count, tokens, vocabulary)
    model(torch.tensor([traces[0][0]], device=DEVICE))
    started, values = time.perf_counter(), []
    for start in range(0, count, batch):
        ids = torch.tensor([prompt + response for prompt, response in traces[start : start + batch]], device=DEVICE)
        logp = model(ids).logits[:, PROMPT - 1 : -1].float().log_softmax(-1)
        chosen = logp.gather(2, ids[:, PROMPT:, None])
        rank = 1 + (logp > chosen).sum(2)
        values += torch.stack((chosen[..., 0].mean(1), rank.float().mean(1)), 1).tolist()
    return {"seconds": time.perf_counter() - started, "peak_bytes": read_peak_bytes(), "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=5000)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4, help="number of traces scored at a time")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with TemporaryDirectory() as directory:
        save_model(Path(directory), options.layers, options.width, options.vocabulary)
        results: dict[str, list[dict[str, Any]]] = {"genssd": [], "transformers": []}
        for _ in range(options.rounds):
            for name, run in (("genssd", score_with_genssd), ("transformers", score_with_transformers)):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    arguments = (directory, options.traces, options.tokens, options.vocabulary, options.batch)
                    results[name].append(pool.apply(run, arguments))
    first, second = (torch.tensor(results[name][0].pop("values")) for name in results)
    torch.testing.assert_close(first, second, atol=1e-2 if GPU else 1e-3, rtol=2e-2 if GPU else 1e-3)
    rows = {}
    for name, runs in results.items():
        seconds = sorted(run["seconds"] for run in runs)[len(runs) // 2]
        rows[name] = {"seconds": round(seconds, 2), "peak_mib": max(run["peak_bytes"] for run in runs) >> 20}
        rate = options.traces * options.tokens / seconds
        print(f"{name:14} {seconds:8.1f} s  {rate:9.0f} tokens/s  peak {rows[name]['peak_mib']:6} MiB")
    print(f"ratio {rows['transformers']['seconds'] / rows['genssd']['seconds']:.2f}x")
    if options.json:
        shape = {"traces": options.traces, "tokens": options.tokens, "batch": options.batch, "device": DEVICE}
        shape |= {"layers": options.layers, "width": options.width, "vocabulary": options.vocabulary}
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({**shape, **machine, **rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
