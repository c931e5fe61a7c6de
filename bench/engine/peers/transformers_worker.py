"""Worker that runs the workloads on transformers, written with care: bf16, sdpa, DynamicCache, no prefix computed
twice, logits only where they are used.

Shapes:  B rows   V vocabulary
"""

from __future__ import annotations

import time

import torch
import transformers
from bench.engine.peers import workloads as work
from bench.engine.peers.protocol import Measured, WorkerOptions, parse_worker_options, serve, take_stdout
from bench.engine.peers.workloads import Sizes
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM


class TransformersWorkloads:
    """The workloads on transformers, and scoring in float32 as the reference for all engines."""

    def __init__(self, options: WorkerOptions) -> None:
        self.directory = options.directory / "model"
        self.model = self._load(torch.bfloat16)
        self.top_p = options.top_p

    def _load(self, dtype: torch.dtype) -> Qwen3ForCausalLM:
        return Qwen3ForCausalLM.from_pretrained(self.directory, dtype=dtype, attn_implementation="sdpa").eval()

    def prefill(self, sizes: Sizes, round_: int) -> Measured:
        prompt = work.prefix_ids(sizes, "prefill", round_)
        started = time.perf_counter()
        _, logits = self._read(self.model, [prompt], None, keep=1)
        draw(logits[:, -1], self.top_p)
        return Measured(seconds=time.perf_counter() - started)

    def decode(self, sizes: Sizes, round_: int) -> Measured:
        started = time.perf_counter()
        cache, _ = self._read(self.model, [work.prefix_ids(sizes, "decode", round_)], None, keep=1)
        warm = time.perf_counter()
        tokens = torch.tensor(work.first_ids(sizes, round_))
        cache = repeated(cache, sizes.branches)
        for _ in range(sizes.decoded):
            tokens = draw(self._step(tokens[:, None], cache, keep=1)[:, -1], self.top_p)
        return Measured(seconds=time.perf_counter() - warm, prefix_seconds=warm - started)

    def score(self, sizes: Sizes, round_: int) -> Measured:
        return self._score(self.model, sizes, round_)

    def reference(self, sizes: Sizes, round_: int) -> Measured:
        """Score in float32: the log-probabilities of all engines are compared with these."""
        return self._score(self._load(torch.float32), sizes, round_)

    def _score(self, model: Qwen3ForCausalLM, sizes: Sizes, round_: int) -> Measured:
        responses = work.candidate_ids(sizes, round_)
        started = time.perf_counter()
        cache, boundary = self._read(model, [work.prefix_ids(sizes, "score", round_)], None, keep=1)
        warm = time.perf_counter()
        _, logits = self._read(model, [ids[:-1] for ids in responses], repeated(cache, len(responses)), keep=0)
        targets = torch.tensor(responses)
        first = boundary[0].float().log_softmax(-1)[:, targets[:, 0]].T
        logprob = torch.cat([first, chosen_logprob(logits, targets[:, 1:])], 1)
        seconds = time.perf_counter() - warm
        return Measured(seconds=seconds, prefix_seconds=warm - started, values=logprob.double().tolist())

    def select_expand(self, sizes: Sizes, round_: int) -> Measured:
        """Run the search. The caches hold all tokens but the last of each text, which the next forward pass reads."""
        n = sizes.per_prompt
        prompts = work.prompt_ids(sizes, round_)
        started = time.perf_counter()
        teacher, student = (self._read(self.model, [ids[:-1] for ids in prompts], None, keep=1)[0] for _ in range(2))
        last = torch.tensor([ids[-1] for ids in prompts])
        for _ in range(sizes.response // sizes.chunk):
            logits = self._step(last[:, None], teacher, keep=1)[:, -1]
            tokens = draw(logits.repeat_interleave(n, 0), self.top_p)
            teacher.batch_repeat_interleave(n)
            student.batch_repeat_interleave(n)
            drawn = [tokens]
            for _ in range(sizes.chunk - 1):
                tokens = draw(self._step(tokens[:, None], teacher, keep=1)[:, -1], self.top_p)
                drawn.append(tokens)
            chunk = torch.stack(drawn, 1)
            read = torch.cat([last.repeat_interleave(n)[:, None], chunk[:, :-1]], 1)
            logprob = chosen_logprob(self._step(read, student, keep=0), chunk)
            best = logprob.mean(1).view(-1, n).argmax(1) + n * torch.arange(len(prompts))
            teacher.batch_select_indices(best)
            student.batch_select_indices(best)
            last = chunk[best, -1]
        return Measured(seconds=time.perf_counter() - started)

    def _read(
        self, model: Qwen3ForCausalLM, ids: list[list[int]], cache: DynamicCache | None, keep: int
    ) -> tuple[DynamicCache, Tensor]:
        """Read the ids of all rows into a cache (None: a new one); return it and the logits of the last `keep` ids.

        keep 0 returns the logits of all ids.
        """
        cache = DynamicCache(config=model.config) if cache is None else cache
        out = model(torch.tensor(ids), past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return cache, out.logits

    def _step(self, ids_BT: Tensor, cache: DynamicCache, keep: int) -> Tensor:
        return self.model(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits


def repeated(cache: DynamicCache, rows: int) -> DynamicCache:
    """Return a cache of one row expanded to several rows without a copy; the next forward pass makes the copy."""
    return DynamicCache(
        [(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1)) for layer in cache.layers]
    )


def draw(logits_BV: Tensor, top_p: float) -> Tensor:
    """Draw a token per row at temperature 1 by inversion, with one random number per row.

    torch.multinomial would draw a random number per entry.
    """
    p_BV = logits_BV.float().softmax(-1)
    random_B1 = torch.rand(len(logits_BV), 1)
    if top_p == 1.0:
        cumulative_BV = p_BV.cumsum(-1)
        drawn_B1 = torch.searchsorted(cumulative_BV, random_B1 * cumulative_BV[:, -1:])
        return drawn_B1.clamp(max=logits_BV.shape[1] - 1)[:, 0]
    p_BV, tokens_BV = p_BV.sort(-1, descending=True)
    cumulative_BV = p_BV.cumsum(-1)
    kept_B1 = (cumulative_BV - p_BV < top_p).sum(-1, keepdim=True)
    drawn_B1 = torch.searchsorted(cumulative_BV, random_B1 * cumulative_BV.gather(1, kept_B1 - 1))
    return tokens_BV.gather(1, drawn_B1.minimum(kept_B1 - 1))[:, 0]


def chosen_logprob(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the float32 log-probabilities of targets [rows, tokens], computed row by row to save memory."""
    parts = [
        row.float().log_softmax(-1).gather(1, ids[:, None])[:, 0] for row, ids in zip(logits, targets, strict=True)
    ]
    return torch.stack(parts)


def main() -> None:
    options = parse_worker_options()
    out = take_stdout()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        runner = TransformersWorkloads(options)
        serve(
            out,
            options.sizes,
            transformers.__version__,
            f"torch {torch.__version__}, bf16, sdpa, DynamicCache, logits_to_keep, inference_mode",
            {name: getattr(runner, name) for name in (*work.WORKLOADS, "reference")},
            {"select_expand": "one copy of the weights serves as teacher and student"},
        )


if __name__ == "__main__":
    main()
