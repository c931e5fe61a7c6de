"""Worker that runs the workloads on openvino-genai's ContinuousBatchingPipeline with prefix caching.

It converts the model once and keeps the result next to the model.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import numpy as np
import openvino
import openvino_genai
from bench.engine.peers import workloads as work
from bench.engine.peers.protocol import Measured, WorkerOptions, parse_worker_options, serve, take_stdout
from bench.engine.peers.workloads import Sizes

Ids = list[list[int]]


class OpenVinoWorkloads:
    """The workloads on openvino-genai, with one pipeline as teacher and one as student."""

    def __init__(self, options: WorkerOptions) -> None:
        self.end_id = options.sizes.model.vocabulary - 1
        self.directory = options.directory / "openvino"
        self.threads = options.threads
        self.top_p = options.top_p
        if not self.directory.exists():
            convert(options.directory / "model", self.directory)
        self.teacher = self._pipeline()
        self.student = self._pipeline()
        self.requests = 0

    def _pipeline(self) -> openvino_genai.ContinuousBatchingPipeline:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1  # GB
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = 2048
        # without instructions for bfloat16 it refuses such a cache
        has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        precision = "bf16" if has_bf16 else "f32"
        properties = {
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,  # its default is 8 bits
            "PERFORMANCE_HINT": "LATENCY",
        }
        return openvino_genai.ContinuousBatchingPipeline(self.directory, scheduler, "CPU", properties)

    def prefill(self, sizes: Sizes, round_: int) -> Measured:
        prompt = work.prefix_ids(sizes, "prefill", round_)
        started = time.perf_counter()
        self._generate(self.teacher, [prompt], self._config(1))
        return Measured(seconds=time.perf_counter() - started)

    def decode(self, sizes: Sizes, round_: int) -> Measured:
        prefix = work.prefix_ids(sizes, "decode", round_)
        started = time.perf_counter()
        self._generate(self.teacher, [prefix], self._config(1))
        warm = time.perf_counter()
        rows = [[*prefix, first] for first in work.first_ids(sizes, round_)]
        written = self._generate(self.teacher, rows, self._config(sizes.decoded))
        seconds = time.perf_counter() - warm
        assert all(len(ids) == sizes.decoded for row in written for ids in row)
        return Measured(seconds=seconds, prefix_seconds=warm - started)

    def score(self, sizes: Sizes, round_: int) -> Measured:
        prefix = work.prefix_ids(sizes, "score", round_)
        started = time.perf_counter()
        self._generate(self.teacher, [prefix], self._config(1))
        warm = time.perf_counter()
        values = self._score(self.teacher, [prefix + ids for ids in work.candidate_ids(sizes, round_)], sizes.scored)
        return Measured(seconds=time.perf_counter() - warm, prefix_seconds=warm - started, values=values)

    def select_expand(self, sizes: Sizes, round_: int) -> Measured:
        texts = work.prompt_ids(sizes, round_)
        config = self._config(sizes.chunk)
        config.num_return_sequences = sizes.per_prompt
        started = time.perf_counter()
        for _ in range(sizes.response // sizes.chunk):
            drawn = self._generate(self.teacher, texts, config)
            rows = [text + chunk for text, chunks in zip(texts, drawn, strict=True) for chunk in chunks]
            if len(texts[0]) == sizes.prompt:
                self._generate(
                    self.student, texts, self._config(1)
                )  # otherwise every row would compute its prompt again
            scores = [fmean(v for v in row if v is not None) for row in self._score(self.student, rows, sizes.chunk)]
            n = sizes.per_prompt
            best = [i * n + int(np.argmax(scores[i * n : (i + 1) * n])) for i in range(len(texts))]
            texts = [rows[i] for i in best]
        return Measured(seconds=time.perf_counter() - started)

    def _config(self, tokens: int) -> openvino_genai.GenerationConfig:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.do_sample = True
        config.temperature = 1.0
        config.top_p = self.top_p
        config.ignore_eos = True
        config.set_eos_token_id(self.end_id)  # the pipeline requires one
        return config

    def _score(
        self, pipeline: openvino_genai.ContinuousBatchingPipeline, rows: Ids, last: int
    ) -> list[list[float | None]]:
        """Return the log-probabilities of the last tokens of each row; the pipeline always writes one more token.

        Where its cache ends right before these tokens, it returns no value for the first of them, which becomes None.
        """
        config = self._config(1)
        config.echo = True
        config.logprobs = 1
        logprobs = [output[0].generated_log_probs[:-1][-last:] for output in self._run(pipeline, rows, config)]
        return [[None] * (last - len(values)) + values for values in logprobs]

    def _generate(
        self, pipeline: openvino_genai.ContinuousBatchingPipeline, rows: Ids, config: openvino_genai.GenerationConfig
    ) -> list[Ids]:
        return [[list(output.generated_ids) for output in row] for row in self._run(pipeline, rows, config)]

    def _run(
        self, pipeline: openvino_genai.ContinuousBatchingPipeline, rows: Ids, config: openvino_genai.GenerationConfig
    ) -> list[list[openvino_genai.GenerationOutput]]:
        handles = []
        for row in rows:
            self.requests += 1
            config.rng_seed = self.requests
            handles.append(pipeline.add_request(self.requests, openvino.Tensor(np.array([row])), config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return [handle.read_all() for handle in handles]


def convert(model: Path, directory: Path) -> None:
    """Convert the model with bf16 weights, in a temporary directory that is renamed when it is complete."""
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    part = directory.with_suffix(".part")
    OVModelForCausalLM.from_pretrained(model, export=True, compile=False, load_in_8bit=False).save_pretrained(part)
    names = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
    converted = convert_tokenizer(AutoTokenizer.from_pretrained(model), with_detokenizer=True)
    for name, graph in zip(names, converted, strict=True):
        openvino.save_model(graph, part / name)
    os.replace(part, directory)


def main() -> None:
    options = parse_worker_options()
    out = take_stdout()
    runner = OpenVinoWorkloads(options)
    serve(
        out,
        options.sizes,
        version("openvino-genai"),
        f"openvino {version('openvino')}, ContinuousBatchingPipeline, prefix caching, bf16 inference and cache",
        {name: getattr(runner, name) for name in work.WORKLOADS},
        {
            "score": "echo with logprobs=1: no value for a candidate's first token, one token more is written",
            "select_expand": "num_return_sequences; scored by echo with logprobs=1 in a second pipeline, as in score",
        },
    )


if __name__ == "__main__":
    main()
