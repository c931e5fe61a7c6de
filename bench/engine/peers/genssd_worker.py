"""Worker that runs the workloads on genssd, through the public `genssd.Engine`."""

from __future__ import annotations

import time
from importlib.metadata import version

import torch
from bench.engine.peers import workloads as work
from bench.engine.peers.protocol import Measured, WorkerOptions, parse_worker_options, serve, take_stdout
from bench.engine.peers.workloads import Sizes

from genssd import Chunk, Engine, Sampling

CACHE_BYTES = 2 << 30  # of each engine


class GenssdWorkloads:
    """The workloads on genssd.

    writer: engine with one model, for all workloads but the search. pair: engine with the same weights as teacher and
    as student.
    """

    def __init__(self, options: WorkerOptions) -> None:
        model = options.directory / "model"
        self.sampling = Sampling(temperature=1.0, top_p=options.top_p)
        self.writer = Engine.from_pretrained(teacher=model, device="cpu", memory_bytes=CACHE_BYTES)
        self.pair = Engine.from_pretrained(teacher=model, student=model, device="cpu", memory_bytes=2 * CACHE_BYTES)

    def prefill(self, sizes: Sizes, round_: int) -> Measured:
        prompt = work.prefix_ids(sizes, "prefill", round_)
        return Measured(seconds=self._prefill_seconds(prompt))

    def decode(self, sizes: Sizes, round_: int) -> Measured:
        started = time.perf_counter()
        root = self.writer.branch(work.prefix_ids(sizes, "decode", round_), sampling=self.sampling)
        root.expand(1, Chunk(tokens=1, until=None))[0].drop()  # the prefix is in the cache now
        warm = time.perf_counter()
        # the first token of each branch comes from the prefix's last state: `decoded` forward passes follow
        branches = root.expand(sizes.branches, Chunk(tokens=1 + sizes.decoded, until=None))
        ended = time.perf_counter()
        for branch in (*branches, root):
            branch.drop()
        return Measured(seconds=ended - warm, prefix_seconds=warm - started)

    def score(self, sizes: Sizes, round_: int) -> Measured:
        prefix = work.prefix_ids(sizes, "score", round_)
        responses = work.candidate_ids(sizes, round_)
        before = self._prefill_seconds(prefix)
        started = time.perf_counter()
        stats = self.writer.score([prefix] * len(responses), responses, model="teacher")
        seconds = time.perf_counter() - started
        prefill = (before + self._prefill_seconds(prefix)) / 2
        return Measured(
            seconds=seconds - prefill, prefix_seconds=prefill, values=[s.logprob.double().tolist() for s in stats]
        )

    def select_expand(self, sizes: Sizes, round_: int) -> Measured:
        started = time.perf_counter()
        selections = self.pair.select_expand(
            work.prompt_ids(sizes, round_),
            candidates=sizes.per_prompt,
            chunk=Chunk(tokens=sizes.chunk, until=None),
            max_tokens=sizes.response,
            sampling=self.sampling,
            loop_guard=None,
        )
        seconds = time.perf_counter() - started
        assert all(len(selection.best.token_ids) == sizes.response for selection in selections)
        return Measured(seconds=seconds)

    def _prefill_seconds(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        self.writer.generate([prompt], max_tokens=1, sampling=self.sampling)
        return time.perf_counter() - started


def main() -> None:
    options = parse_worker_options()
    out = take_stdout()
    torch.set_num_threads(options.threads)
    runner = GenssdWorkloads(options)
    serve(
        out,
        options.sizes,
        version("genssd"),
        f"torch {torch.__version__}, bf16 weights and cache, public API",
        {name: getattr(runner, name) for name in work.WORKLOADS},
        {
            "decode": "one sampling step more than the others: the branches' first token",
            "score": "a call that computes prefix and candidates, less the mean of a prefill before and one after it",
        },
    )


if __name__ == "__main__":
    main()
