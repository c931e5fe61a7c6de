"""Time of the student's side of a search: reading the teacher's tokens by bytes, against reading them by ids.

    python -m bench.engine.two_tokenizers --model DIR --data FILE [--json bench/results/two_tokenizers.json]

One model scores the same candidates twice, with its own tokenizer as the teacher's: by ids (`TokenMap`), and by bytes
(`ByteReader`), where its tokenizer divides the text anew and the end of every chunk is held back. The candidates are
texts of the data file in chunks; both ways alternate on one machine. Times are the processor's, which other jobs change
little. Before times are reported, the tokens and the
log-probabilities of the whole responses are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genssd.engine.calls.session import Session
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.candidate_scoring import CandidateScorer
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling
from genssd.engine.models.state_rows import StateRow
from genssd.engine.readers.byte_reader import ByteReader
from genssd.engine.readers.reading import Reader
from genssd.engine.readers.token_map import TokenMap
from genssd.kernels.logprob import TokenStats


def read_texts(path: Path, count: int) -> list[str]:
    """Return the longest text of each of the first rows of a JSONL file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    return [max((value for value in row.values() if isinstance(value, str)), key=len) for row in rows]


def score_texts(
    engine: Engine, reader: Reader, texts: Sequence[Sequence[int]], tokens: int, copies: int
) -> tuple[float, list[tuple[tuple[int, ...], TokenStats]]]:
    """Return the processor's seconds of scoring all chunks of all texts, and the tokens and statistics of every text.

    Every round scores the next chunk of all texts, `copies` candidates of each, and keeps the first.
    """
    resources = engine._resources
    session = Session(resources, Sampling(), "teacher")
    runner = resources.runner("student")
    scorer = CandidateScorer(runner, reader, resources.usage)
    prompt = resources.encode_all(["Question: "], ["the prompt"], ["teacher", "student"])
    ids = next(prompt).ids
    branches = [Branch.root(session, ids, i) for i in range(len(texts))]
    for branch in branches:
        branch.student.path = runner.tree.root()
        (states,) = runner.extend([branch.student.path], [ids.student], last=[1])
        branch.student.hidden, branch.student.pending = StateRow(states, 0), []
    seconds, start = 0.0, 0
    while start < max(map(len, texts)):
        expansions = []
        for branch, text in zip(branches, texts, strict=True):
            if start < len(text):
                expansion = Expansion(branch, copies, Chunk(tokens=tokens, until=None), tokens, "a text")
                for _ in range(copies):
                    child = branch.child()
                    child.chunk = list(text[start : start + tokens])
                    child.chunk_writer_logprob = [0.0] * len(child.chunk)
                    child.ended = "chunk" if start + tokens < len(text) else "length"
                    expansion.children.append(child)
                expansions.append(expansion)
        began = time.process_time()
        scorer.score(expansions)
        seconds += time.process_time() - began
        for expansion in expansions:
            kept, *others = expansion.children
            branches[branches.index(expansion.parent)] = kept
            kept.commit()
            for branch in (expansion.parent, *others):
                branch.drop()
        start += tokens
    results = [(branch.student_ids, branch.response().stats) for branch in branches]
    for branch in branches:
        branch.drop()
    return seconds, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of a checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file; the longest text of a row is a response")
    parser.add_argument("--texts", type=int, default=8, help="number of responses that are scored together")
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 64, 256], help="numbers of tokens in a chunk")
    parser.add_argument("--candidates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = Engine.from_pretrained(
        options.model, options.model, dtype="float32", memory_bytes=2 << 30, threads=options.threads
    )
    tokenizer = engine.tokenizer("student")
    readers: dict[str, Reader] = {
        "ids": TokenMap(),
        "bytes": ByteReader.of(tokenizer, tokenizer, "teacher", "student"),
    }
    texts = [tokenizer.encode_plain(text) for text in read_texts(options.data, options.texts)]
    report: dict[str, Any] = {
        "model": options.model.name, "texts": len(texts), "tokens": sum(map(len, texts)), "threads": options.threads,
        "candidates": options.candidates, "rounds": options.rounds, "torch": torch.__version__,
    }  # fmt: skip
    for tokens in options.chunks:
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        found: dict[str, Any] = {}
        for turn in range(options.rounds + 1):
            for name, reader in readers.items():
                taken, found[name] = score_texts(engine, reader, texts, tokens, options.candidates)
                if turn:  # the first one warms up
                    seconds[name].append(taken)
        for (ids, stats), (other_ids, other_stats) in zip(found["ids"], found["bytes"], strict=True):
            assert ids == other_ids
            torch.testing.assert_close(stats.logprob, other_stats.logprob, atol=1e-4, rtol=1e-4)
        ratios = [by_bytes / by_ids for by_bytes, by_ids in zip(seconds["bytes"], seconds["ids"], strict=True)]
        row = {name: round(statistics.median(times), 4) for name, times in seconds.items()}
        report[f"chunk {tokens}"] = {**row, "ratio": round(statistics.median(ratios), 3)}
        print(f"chunks of {tokens:4} tokens: {row['ids']:8.3f} s by ids, {row['bytes']:8.3f} s by bytes, "
              f"{statistics.median(ratios):.3f} times")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
