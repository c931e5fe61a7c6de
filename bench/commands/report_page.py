"""A page of `genssd report` over a large synthetic search: its size, the time to make and to open it, and scrolling.

    python -m bench.commands.report_page [--prompts 500] [--tokens 4096] [--json FILE]

The search has four candidates of 64 tokens in every round, whose texts are pieces of this repository's documents in the
tokens of the small pair, and whose log-probabilities are drawn: most tokens are nearly certain, some are surprising.
What is measured in the browser: the time until the page is ready with the first tree drawn, the time from one prompt to
the next, the frames while tree, text and list are scrolled, and the memory of its script. Times of the clock are those
of a window without a GPU, beside whatever else runs; names with cpu are computing time of one thread. Without Chromium
only the making is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from genssd.distill import small_pair
from genssd.distill.report.config import ReportConfig
from genssd.distill.report.run import run_report
from genssd.distill.runs.journal import make_line
from genssd.distill.runs.record import PACKAGES
from genssd.engine.texts.text import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.browser import Page, find_browser, open_page

PAIR = Path(next(iter(small_pair.__path__)))
CHUNK, CANDIDATES = 64, 4
STEPS, PROMPTS_SHOWN = 120, 20
FRAMES = """
(async (selector) => {
  const node = document.querySelector(selector);
  const frames = [];
  let last = performance.now();
  for (let i = 0; i < STEPS; i += 1) {
    node.scrollTop += 60;
    await new Promise(requestAnimationFrame);
    frames.push(performance.now() - last);
    last = performance.now();
  }
  return {mean: frames.reduce((a, b) => a + b) / frames.length, scrolled: node.scrollTop};
})
""".replace("STEPS", str(STEPS))


def write_run(directory: Path, prompts: int, tokens: int) -> None:
    """Write the run: record, journal, decisions and summary."""
    directory.mkdir(parents=True)
    tokenizer = Tokenizer(PAIR / "student")
    texts = " ".join(path.read_text() for path in sorted(Path("docs").glob("*.md")))
    ids = tokenizer.encode_plain(texts)
    config = {
        "criterion": "ppl", "student": str(PAIR / "student"), "teacher": str(PAIR / "teacher"), "threshold": None,
        "candidates": CANDIDATES, "chunk": {"tokens": CHUNK, "until": None, "limit": CHUNK, "shortest": 8},
    }  # fmt: skip
    record = {"command": "select", "config": config, "settings": {}, "python": "3"}
    record["versions"] = dict.fromkeys(PACKAGES, "0")
    (directory / "run.json").write_text(json.dumps(record))
    (directory / "summary.json").write_text("{}")
    with (directory / "selections.jsonl").open("wb") as journal, (directory / "decisions.jsonl").open("wb") as log:
        for index in range(prompts):
            row, decision = make_prompt(index, tokens, ids, tokenizer.fingerprint)
            journal.write(make_line(row))
            log.write(make_line(decision))


def make_prompt(index: int, tokens: int, ids: list[int], fingerprint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the lines of one prompt."""
    generator = np.random.default_rng(index)
    candidates: list[dict[str, Any]] = []
    trace: list[int] = []
    kept_ids: list[int] = []
    for round_ in range(tokens // CHUNK):
        siblings = [make_candidate(generator, ids) for _ in range(CANDIDATES)]
        scores = [float(np.exp(-np.mean(c["student"]["logprob"]))) for c in siblings]
        best = int(np.argmin(scores))
        is_last = round_ == tokens // CHUNK - 1
        for i, candidate in enumerate(siblings):
            fields = {"trace": [*trace, i], "attempt": 0, "verdict": "kept" if i == best else "beaten"}
            fields |= {"score": scores[i], "probability": None, "ended": "length" if is_last else "chunk"}
            candidates.append({**fields, **candidate})
        trace.append(best)
        kept_ids += siblings[best]["token_ids"]
    question = f"Synthetic problem {index}: how many pens does a shop sell in {index + 3} days?"
    row = {
        "prompt": [{"role": "user", "content": question}], "answer": str(index), "status": "length",
        "correct": bool(index % 3), "undecided": None, "cut_by": "max_tokens", "score": float(generator.uniform(1, 2)),
        "prompt_ids": [1], "student_prompt_ids": [1], "completion_ids": kept_ids, "others": [],
        "rounds": {"selected": tokens // CHUNK}, "index": index, "source": {"file": "synthetic", "line": index + 1},
        "seed": 0, "occurrence": 0, "tokenizer": fingerprint, "teacher": {"name": "teacher", "fingerprint": "0"},
        "student": {"name": "student", "fingerprint": "0"},
    }  # fmt: skip
    rounds = [
        {"round": i, "attempt": 0, "chunk_tokens": CHUNK, "chunk_limit": CHUNK, "decision": "selected"}
        for i in range(tokens // CHUNK)
    ]
    return row, {"index": index, "rounds": rounds, "ended_by": None, "candidates": candidates}


def make_candidate(generator: np.random.Generator, ids: list[int]) -> dict[str, Any]:
    """Return tokens and statistics of one candidate: the logarithm of its surprisals is normal, about 0.05 nats."""
    start = int(generator.integers(0, len(ids) - CHUNK))
    student, teacher = (
        [-round(float(v), 7) for v in np.minimum(np.exp(generator.normal(-3.0, 2.5, CHUNK)), 20)] for _ in range(2)
    )
    rank = [1 if s > -0.7 else int(min(5000, np.exp(-s))) for s in student]
    stats: dict[str, Any] = {"logprob": student, "entropy": [-s * 0.9 for s in student], "sum_p2": [0.5] * CHUNK}
    stats |= {"logsumexp": [20.0] * CHUNK, "rank": rank}
    return {"token_ids": ids[start : start + CHUNK], "teacher_logprob": teacher, "student": stats}


def read_cpu(page: Page) -> float:
    """Return the milliseconds that the page's main thread has computed so far."""
    metrics = page.call("Performance.getMetrics")["metrics"]
    return next(1000.0 * metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def measure_page(page: Page, path: Path) -> Iterator[tuple[str, float]]:
    """Yield what the browser needs for the page, by name. cpu: computing time of the main thread."""
    page.call("Performance.enable", timeDomain="threadTicks")
    started = time.monotonic()
    page.open(path)
    page.wait("document.querySelector('.tree')")
    yield "open_ms", 1000 * (time.monotonic() - started)
    yield "open_cpu_ms", read_cpu(page)
    times, before = [], read_cpu(page)
    for _ in range(PROMPTS_SHOWN):
        started = time.monotonic()
        page.run("(async () => { state.at += 1; await showPrompt(); document.body.offsetHeight; })()")
        times.append(1000 * (time.monotonic() - started))
    yield "next_prompt_ms", statistics.median(times)
    yield "next_prompt_cpu_ms", (read_cpu(page) - before) / PROMPTS_SHOWN
    for name, selector in (("tree", ".tree"), ("text", ".text"), ("list", "#list")):
        before = read_cpu(page)
        frames = page.run(f"{FRAMES}({selector!r})")
        yield f"scroll_{name}_cpu_ms_per_frame", (read_cpu(page) - before) / STEPS
        yield f"scroll_{name}_mean_frame_ms", frames["mean"]
        assert frames["scrolled"] > 0, f"{selector} does not scroll"
    yield "script_memory_mib", page.run("performance.memory.usedJSHeapSize") / 2**20
    assert page.problems == [], page.problems


def measure(prompts: int, tokens: int, directory: Path) -> Iterator[tuple[str, float]]:
    """Yield what was measured, by name."""
    write_run(directory / "run", prompts, tokens)
    yield "log_mib", (directory / "run" / "decisions.jsonl").stat().st_size / 2**20
    started, cpu = time.monotonic(), time.process_time()
    summary = run_report(ReportConfig(run=(str(directory / "run"),), output=str(directory / "page.html")))
    yield "make_s", time.monotonic() - started
    yield "make_cpu_s", time.process_time() - cpu
    yield "page_mib", summary.bytes / 2**20
    if find_browser() is not None:
        with open_page(directory / "profile") as page:
            page.resize(1400, 900)
            yield from measure_page(page, summary.path)


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=4096, help="in a response; four times as many are sampled")
    parser.add_argument("--directory", type=Path, help="where the run and the page are left; default: nowhere")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results: dict[str, float] = {"prompts": options.prompts, "tokens": options.tokens}
        for name, value in measure(options.prompts, options.tokens, options.directory or Path(temporary)):
            results[name] = round(value, 2)
            print(f"{name} {value:.1f}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
