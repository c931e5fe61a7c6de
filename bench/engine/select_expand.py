"""Growth of a whole search on a CPU: time and computed tokens against the length of the response and the candidates.

    python -m bench.engine.select_expand [--rounds 3] [--json bench/results/select_expand.json]
        [--plot docs/select_expand.png]

For every chunk a teacher writes N candidates, a student scores them by its mean log-probability, and the best one is
kept, until the response is complete. All programs keep as many tokens of one prompt, on one thread, in float32, with
one random model of Qwen3's kind as teacher and student (`SHAPE`). Their rounds alternate.

genssd           `Engine.select_expand`
obvious          `generate` of transformers on the text so far, for every chunk; the student reads all of it with each
                 candidate
caches kept      the same with the caches of both models kept, repeated for the candidates and cut back to the best one
best of N        whole responses by `generate`, of which the student chooses one: no search, and the usual alternative
genssd best of N  the same by `Engine.generate` and `Engine.score`

Times are of the process, not of the clock, since other processes may run; tokens are those that the models compute.
Rows that FILE has already are not measured again, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from bench.engine.peers.machine import describe_machine
from bench.engine.peers.model import save_model
from bench.engine.peers.transformers_worker import chosen_logprob, draw
from bench.engine.peers.workloads import FIRST_ID, SIZES, ModelShape
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM

from genssd import Chunk, Engine, Sampling

SHAPE = ModelShape(layers=4, width=256, inner=768, heads=4, kv_heads=2, head_dim=64, vocabulary=4096)
PROMPT, CHUNK = 64, 32
RESPONSES, CANDIDATES = (64, 128, 256, 512, 1024), (1, 2, 4, 8)
"""Values of the two sizes; while one changes, the other is that of `FIXED`."""
FIXED = {"response": 256, "candidates": 4}
CACHE_BYTES = 256 << 20
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Problem:
    """One search: the prompt, the number of candidates, and the number of tokens of the response."""

    prompt: list[int]
    candidates: int
    response: int


class Programs:
    """The programs, over one model in both libraries."""

    def __init__(self, directory: Path) -> None:
        self.model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.engine = Engine.from_pretrained(
            directory, directory, device="cpu", dtype="float32", threads=1, memory_bytes=CACHE_BYTES
        )
        self._computed = 0
        self.all: dict[str, Callable[[Problem], list[int]]] = {
            "genssd": self.search,
            "obvious": self.search_obviously,
            "caches kept": self.search_with_caches,
            "best of N": self.choose_response,
            "genssd best of N": self.choose_response_with_engine,
        }

    @property
    def computed_tokens(self) -> int:
        """Number of tokens that all models have computed so far, those of teacher and student."""
        return self._computed + self.engine.usage.computed_tokens

    def _count(self, module: Any, arguments: Any, options: dict[str, Any]) -> None:
        self._computed += options["input_ids"].numel()

    def search(self, problem: Problem) -> list[int]:
        (selection,) = self.engine.select_expand(
            [problem.prompt],
            candidates=problem.candidates,
            chunk=Chunk(tokens=CHUNK, until=None),
            max_tokens=problem.response,
            sampling=Sampling(),
            loop_guard=None,
        )
        return list(selection.best.token_ids)

    def search_obviously(self, problem: Problem) -> list[int]:
        text_1T = torch.tensor([problem.prompt])
        for _ in range(problem.response // CHUNK):
            text_1T = self._choose(self._generate(text_1T, problem.candidates, CHUNK), CHUNK)
        return text_1T[0, PROMPT:].tolist()

    def search_with_caches(self, problem: Problem) -> list[int]:
        """Search with caches that hold all tokens but the last of the text, which the next forward pass reads."""
        n, prompt = problem.candidates, torch.tensor([problem.prompt])
        teacher, student = DynamicCache(config=self.model.config), DynamicCache(config=self.model.config)
        for cache in (teacher, student):
            self._step(prompt[:, :-1], cache, keep=1)
        last, kept = prompt[:, -1], []
        for _ in range(problem.response // CHUNK):
            tokens = draw(self._step(last[:, None], teacher, keep=1)[:, -1].repeat_interleave(n, 0), 1.0)
            teacher.batch_repeat_interleave(n)
            student.batch_repeat_interleave(n)
            drawn = [tokens]
            for _ in range(CHUNK - 1):
                tokens = draw(self._step(tokens[:, None], teacher, keep=1)[:, -1], 1.0)
                drawn.append(tokens)
            chunk_BT = torch.stack(drawn, 1)
            read_BT = torch.cat([last.repeat_interleave(n)[:, None], chunk_BT[:, :-1]], 1)
            best = chosen_logprob(self._step(read_BT, student, keep=0), chunk_BT).mean(1).argmax()[None]
            teacher.batch_select_indices(best)
            student.batch_select_indices(best)
            last = chunk_BT[best, -1]
            kept += chunk_BT[int(best)].tolist()
        return kept

    def choose_response(self, problem: Problem) -> list[int]:
        texts_BT = self._generate(torch.tensor([problem.prompt]), problem.candidates, problem.response)
        return self._choose(texts_BT, problem.response)[0, PROMPT:].tolist()

    def choose_response_with_engine(self, problem: Problem) -> list[int]:
        (written,) = self.engine.generate(
            [problem.prompt], n=problem.candidates, max_tokens=problem.response, sampling=Sampling()
        )
        responses = [one.token_ids for one in written]
        scores = [
            float(stats.logprob.mean()) for stats in self.engine.score([problem.prompt] * len(responses), responses)
        ]
        return list(responses[scores.index(max(scores))])

    def _generate(self, text_1T: Tensor, n: int, tokens: int) -> Tensor:
        """Return n continuations of a text, each with the text before it."""
        out: Tensor = self.model.generate(
            text_1T, attention_mask=torch.ones_like(text_1T), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            num_return_sequences=n, max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
        return out

    def _choose(self, texts_BT: Tensor, tokens: int) -> Tensor:
        """Return the text, [1, T], whose last tokens the student finds most likely, after reading all texts."""
        logits = self.model(input_ids=texts_BT[:, :-1], use_cache=False, logits_to_keep=tokens).logits
        return texts_BT[chosen_logprob(logits, texts_BT[:, -tokens:]).mean(1).argmax()][None]

    def _step(self, ids_BT: Tensor, cache: DynamicCache, keep: int) -> Tensor:
        logits: Tensor = self.model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
        return logits


def make_problem(candidates: int, response: int, round_: int) -> Problem:
    """Return a problem with a prompt that no other round has."""
    generator = torch.Generator().manual_seed(1000 * response + 10 * candidates + round_)
    prompt = torch.randint(FIRST_ID + 1, SHAPE.vocabulary - 1, (PROMPT,), generator=generator).tolist()
    return Problem(prompt, candidates, response)


def check(programs: Programs) -> float:
    """Compare the engine's log-probabilities of a response with transformers'; return the largest difference, nats.

    Exits where it is above TOLERANCE: programs that compute something else are not compared.
    """
    problem = make_problem(2, 2 * CHUNK, 0)
    ids = programs.search(problem)
    (stats,) = programs.engine.score([problem.prompt], [ids])
    text = torch.tensor([[*problem.prompt, *ids]])
    logits = programs.model(input_ids=text[:, :-1], logits_to_keep=len(ids)).logits
    difference = float((chosen_logprob(logits, text[:, -len(ids) :])[0] - stats.logprob).abs().max())
    if difference > TOLERANCE:
        sys.exit(f"genssd and transformers differ by {difference:.1e} nats")
    return difference


def measure(programs: Programs, size: str, value: int, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each program at one value of a size; the rounds of the programs alternate."""
    sizes = {**FIXED, size: value}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs.all}
    computed: dict[str, int] = {}
    for round_ in range(1, 1 + rounds):
        problem = make_problem(sizes["candidates"], sizes["response"], round_)
        for name, program in programs.all.items():
            before, started, clock = programs.computed_tokens, time.process_time(), time.perf_counter()
            kept = program(problem)
            seconds[name].append((time.process_time() - started, time.perf_counter() - clock))
            assert len(kept) == problem.response
            computed[name] = programs.computed_tokens - before
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        each = [cpu for cpu, _ in times]
        rows.append(
            {
                "size": size,
                "value": value,
                "program": name,
                "seconds": round(median(each), 3),
                "min": round(min(each), 3),
                "max": round(max(each), 3),
                "clock_seconds": round(median(clock for _, clock in times), 3),
                "computed_tokens": computed[name],
            }
        )
        print("{size:10} {value:5} {program:17} {seconds:8.2f} s  {computed_tokens:8d} tokens".format(**rows[-1]))
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the seconds and the computed tokens of all programs against both sizes into an image file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    styles = {
        "genssd": {"color": "#1f4e9c", "marker": "o"},
        "obvious": {"color": "#c0392b", "marker": "s"},
        "caches kept": {"color": "#d9822b", "marker": "^"},
        "best of N": {"color": "#777777", "marker": "x", "linestyle": "--"},
        "genssd best of N": {"color": "#7aa6e0", "marker": "+", "linestyle": "--"},
    }
    titles = {
        "response": f"{FIXED['candidates']} candidates per chunk of {CHUNK} tokens",
        "candidates": f"a response of {FIXED['response']} tokens",
    }
    labels = {"response": "tokens of the response", "candidates": "candidates"}
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for column, size in enumerate(titles):
        for line, quantity in enumerate(("seconds", "computed_tokens")):
            axis = axes[line, column]
            for name, style in styles.items():
                points = [row for row in rows if row["size"] == size and row["program"] == name]
                axis.plot([p["value"] for p in points], [p[quantity] for p in points], label=name, **style)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sorted({row["value"] for row in rows if row["size"] == size}))
            for formatted in (axis.xaxis, axis.yaxis):
                formatted.set_major_formatter(ScalarFormatter())
                formatted.set_minor_formatter(NullFormatter())
            axis.set_title(titles[size], fontsize=11)
            axis.set_xlabel(labels[size])
            axis.grid(which="both", alpha=0.25)
    axes[0, 0].set_ylabel("seconds of CPU time")
    axes[1, 0].set_ylabel("tokens that the models compute")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--longest", type=int, default=RESPONSES[-1], help="longest response")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = json.loads(options.json.read_text())["rows"] if options.json and options.json.exists() else []
    known = {(row["size"], row["value"]) for row in rows}
    values = [("response", value) for value in RESPONSES if value <= options.longest]
    values += [("candidates", value) for value in CANDIDATES]
    with TemporaryDirectory() as folder, torch.inference_mode():
        save_model(Path(folder), replace(SIZES["small"], model=SHAPE))
        programs = Programs(Path(folder))
        difference = check(programs)
        for name, program in programs.all.items():  # a first run warms the program up
            assert len(program(make_problem(2, CHUNK, 0))) == CHUNK, name
        for size, value in (one for one in values if one not in known):
            rows += measure(programs, size, value, options.rounds)
            if options.json:
                write_report(options.json, rows, options.rounds, difference)
    if options.plot:
        plot(rows, options.plot)


def write_report(path: Path, rows: list[dict[str, Any]], rounds: int, difference: float) -> None:
    """Write the rows that are measured so far, with the machine and its load now."""
    report = {
        "command": f"python -m bench.engine.select_expand --rounds {rounds}",
        "machine": {**describe_machine(1), "load": round(os.getloadavg()[0], 1)},
        "model": asdict(SHAPE),
        "sizes": {**FIXED, "prompt": PROMPT, "chunk": CHUNK},
        "largest_difference": difference,
        "rows": rows,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
