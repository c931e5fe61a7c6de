"""Worker that runs the workloads on llama.cpp, through the C interface that llama-cpp-python binds.

It converts the model to GGUF once and keeps the result next to the model. A prefix is computed once and its cells of
the cache are shared by all sequences that go on from it; logits are computed only where they are used. Draws and
log-probabilities are computed from the logits in numpy, on as many threads as the model: llama.cpp's own samplers copy
the vocabulary for every row, on one thread, and it has no scoring.

Shapes:  N rows   V vocabulary
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import llama_cpp
import numpy as np
from bench.engine.peers import workloads as work
from bench.engine.peers.gguf_file import convert
from bench.engine.peers.protocol import Measured, WorkerOptions, parse_worker_options, serve, take_stdout
from bench.engine.peers.workloads import Sizes

SCORED_ROWS = 512
"""Most rows whose logits are computed by one call in scoring; they take 311 MB at a vocabulary of 151936."""

Row = tuple[int, int, int, bool]
"""A token to read: its id, position and sequence, and whether its logits are needed."""


class Context:
    """A cache over the model's weights. cells: tokens that it holds; a cell shared by several sequences counts once."""

    def __init__(self, model: object, vocabulary: int, threads: int, *, cells: int, sequences: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = cells, 2048, 512, sequences
        params.n_outputs_max = SCORED_ROWS
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        assert self._context is not None, "llama.cpp could not create the context"
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = vocabulary
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, False)

    def copy(self, source: int, target: int) -> None:
        """Let the sequence `target`, which is empty, go on from `source`."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def remove(self, sequence: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def read(self, rows: Sequence[Row]) -> np.ndarray:
        """Read tokens and return the logits of those that need them, float32 [N, V], valid until the next call."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, needed) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, needed
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        needed_rows = sum(row[3] for row in rows)
        pointer = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (needed_rows, self._vocabulary))

    def read_prompt(self, ids: Sequence[int], sequence: int = 0) -> np.ndarray:
        """Read a prompt into an empty sequence and return the logits of its last token, [1, V]."""
        return self.read([(token, i, sequence, i == len(ids) - 1) for i, token in enumerate(ids)])


class LlamaWorkloads:
    """The workloads on llama.cpp: one copy of the weights, and a cache each for teacher and student."""

    def __init__(self, options: WorkerOptions) -> None:
        sizes = options.sizes
        path = options.directory / "model.gguf"
        if not path.exists():
            convert(options.directory / "model", path)
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert model is not None, f"llama.cpp could not load {path}"
        sequences = max(1 + max(sizes.branches, sizes.candidates), sizes.prompts * (1 + sizes.per_prompt))
        new = max(sizes.branches * sizes.decoded, sizes.candidates * sizes.scored)
        searched = sizes.prompts * (sizes.prompt + sizes.response + sizes.per_prompt * sizes.chunk)
        cells = -(-max(sizes.prefix + new, searched) // 256) * 256 + 256
        self.teacher, self.student = (
            Context(model, sizes.model.vocabulary, options.threads, cells=cells, sequences=sequences) for _ in range(2)
        )
        self.top_p = options.top_p
        self.pool = ThreadPoolExecutor(options.threads)
        self.random = np.random.default_rng(0)

    def prefill(self, sizes: Sizes, round_: int) -> Measured:
        self.teacher.clear()
        started = time.perf_counter()
        self._draw(self.teacher.read_prompt(work.prefix_ids(sizes, "prefill", round_)))
        return Measured(seconds=time.perf_counter() - started)

    def decode(self, sizes: Sizes, round_: int) -> Measured:
        self.teacher.clear()
        started = time.perf_counter()
        self.teacher.read_prompt(work.prefix_ids(sizes, "decode", round_))
        warm = time.perf_counter()
        for branch in range(1, 1 + sizes.branches):
            self.teacher.copy(0, branch)
        tokens = np.array(work.first_ids(sizes, round_))
        for step in range(sizes.decoded):
            rows = [(int(token), sizes.prefix + step, 1 + i, True) for i, token in enumerate(tokens)]
            tokens = self._draw(self.teacher.read(rows))
        return Measured(seconds=time.perf_counter() - warm, prefix_seconds=warm - started)

    def score(self, sizes: Sizes, round_: int) -> Measured:
        responses = work.candidate_ids(sizes, round_)
        self.teacher.clear()
        started = time.perf_counter()
        boundary = self.teacher.read_prompt(work.prefix_ids(sizes, "score", round_)).copy()
        warm = time.perf_counter()
        first = log_probabilities(boundary[0], np.array([ids[0] for ids in responses]))
        rest = self._score(self.teacher, responses, [0] * len(responses), 1, sizes.prefix)
        seconds = time.perf_counter() - warm
        values = [[float(a), *map(float, row)] for a, row in zip(first, rest, strict=True)]
        return Measured(seconds=seconds, prefix_seconds=warm - started, values=values)

    def select_expand(self, sizes: Sizes, round_: int) -> Measured:
        """Run the search. The caches hold all tokens but the last of each text, which the next call reads."""
        n, prompts = sizes.per_prompt, work.prompt_ids(sizes, round_)
        for context in (self.teacher, self.student):
            context.clear()
        started = time.perf_counter()
        for p, ids in enumerate(prompts):
            self.teacher.read_prompt(ids[:-1], p)
            self.student.read_prompt(ids[:-1], p)
        last = [ids[-1] for ids in prompts]
        length = sizes.prompt - 1
        parents = [p for p in range(len(prompts)) for _ in range(n)]
        for _ in range(sizes.response // sizes.chunk):
            logits = self.teacher.read([(token, length, p, True) for p, token in enumerate(last)])
            tokens = self._draw(logits[parents])
            drawn = [tokens]
            for i, p in enumerate(parents):
                self.teacher.copy(p, len(prompts) + i)
            for step in range(1, sizes.chunk):
                rows = [(int(t), length + step, len(prompts) + i, True) for i, t in enumerate(tokens)]
                tokens = self._draw(self.teacher.read(rows))
                drawn.append(tokens)
            chunks = np.stack(drawn, 1)
            texts = [[last[p], *map(int, chunk)] for p, chunk in zip(parents, chunks, strict=True)]
            scores = self._score(self.student, texts, parents, len(prompts), length)
            best = [p * n + int(np.argmax(scores[p * n : (p + 1) * n].mean(1))) for p in range(len(prompts))]
            for context in (self.teacher, self.student):
                for p, winner in enumerate(best):
                    context.remove(p)
                    context.copy(len(prompts) + winner, p)
                for i in range(len(parents)):
                    context.remove(len(prompts) + i)
            last = [int(chunks[winner, -1]) for winner in best]
            length += sizes.chunk
        return Measured(seconds=time.perf_counter() - started)

    def _score(
        self, context: Context, texts: list[list[int]], parents: list[int], first: int, position: int
    ) -> np.ndarray:
        """Return the log-probabilities of all tokens of each text but its first, which is at `position`.

        Text i becomes the sequence first + i, which goes on from the sequence parents[i].
        """
        tokens = len(texts[0]) - 1
        for i, parent in enumerate(parents):
            context.copy(parent, first + i)
        together = max(1, SCORED_ROWS // tokens)
        parts: list[float] = []
        for start in range(0, len(texts), together):
            group = texts[start : start + together]
            logits = context.read(
                [
                    (t, position + j, first + start + i, True)
                    for i, ids in enumerate(group)
                    for j, t in enumerate(ids[:-1])
                ]
            )
            parts += self.pool.map(log_probability, logits, [t for ids in group for t in ids[1:]])
        return np.array(parts).reshape(len(texts), tokens)

    def _draw(self, logits_NV: np.ndarray) -> np.ndarray:
        """Draw a token per row at temperature 1 by inversion, with one random number per row."""
        numbers = self.random.random(len(logits_NV))
        return np.array(list(self.pool.map(draw, logits_NV, numbers, [self.top_p] * len(numbers))))


def draw(logits_V: np.ndarray, number: float, top_p: float) -> int:
    """Return the token at a number in [0, 1) of the cumulative distribution, among the likeliest that top-p keeps."""
    p_V = np.exp(logits_V - logits_V.max())
    if top_p == 1.0:
        return invert(p_V, number)
    order = np.argsort(p_V)[::-1]
    cumulative = p_V[order].cumsum()
    kept = int((cumulative - p_V[order] < top_p * cumulative[-1]).sum())
    return int(order[invert(p_V[order[:kept]], number)])


def invert(p: np.ndarray, number: float) -> int:
    """Return the place at which the cumulative sum of p exceeds a number in [0, 1) of the total."""
    cumulative = p.cumsum()
    return min(int(np.searchsorted(cumulative, number * cumulative[-1], side="right")), len(p) - 1)


def log_probability(logits_V: np.ndarray, token: int) -> float:
    """Return the log-probability of a token."""
    return float(log_probabilities(logits_V, np.array([token]))[0])


def log_probabilities(logits_V: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of tokens under one row of logits."""
    peak = logits_V.max()
    return logits_V[tokens] - peak - np.log(np.exp(logits_V - peak).sum())


def main() -> None:
    options = parse_worker_options()
    out = take_stdout()
    runner = LlamaWorkloads(options)
    serve(
        out,
        options.sizes,
        llama_cpp.__version__,
        "llama.cpp through llama-cpp-python, bf16 GGUF, float16 cache, unified, native build",
        {name: getattr(runner, name) for name in work.WORKLOADS},
        {"select_expand": "one copy of the weights serves as teacher and student"},
    )


if __name__ == "__main__":
    main()
