"""Growth of time on a CPU: tokens per second against branches, length of the shared prefix, and candidates.

    python -m bench.engine.cpu_growth [--rounds 3] [--json bench/results/cpu_growth.json] [--plot docs/cpu_growth.png]

The model and the workloads are those of cpu_peers.py, with one size changed at a time: decoding after a prefix that is
in the cache (16 tokens per branch), and scoring, here including the prefill of the prefix. transformers is measured as
well where that takes only seconds; peers/limits.py computes the machine's limit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.engine.peers.limits import Limits, limit_seconds, measure_limits
from bench.engine.peers.machine import describe_machine
from bench.engine.peers.model import ensure_model
from bench.engine.peers.protocol import Peer
from bench.engine.peers.workloads import SIZES, Sizes, count_tokens

from genssd.engine.host.machine import available_cores

DECODED = 16
PAUSE = 0.3  # seconds between two measurements; see cpu_peers.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Measurements of one workload over the values of one of its sizes.

    transformers_values: values at which transformers is measured as well.
    """

    workload: str
    size: str
    values: tuple[int, ...]
    transformers_values: tuple[int, ...]
    title: str
    label: str


SERIES = (
    Series(
        workload="decode",
        size="branches",
        values=(1, 2, 4, 8, 16, 32, 64),
        transformers_values=(1, 4, 16),
        title="decoding after a prefix of {prefix} tokens",
        label="branches",
    ),
    Series(
        workload="decode",
        size="prefix",
        values=(128, 256, 512, 1024, 2048, 4096, 8192),
        transformers_values=(128, 512, 2048),
        title="decoding {branches} branches",
        label="tokens of the shared prefix",
    ),
    Series(
        workload="score",
        size="candidates",
        values=(1, 2, 4, 8, 16, 32, 64),
        transformers_values=(1, 4, 16),
        title="scoring {scored} tokens each, and reading the {prefix} before",
        label="candidates",
    ),
)


def time_once(peer: Peer, series: Series, value: int, round_: int) -> float:
    """Return the seconds of one run: of decoding after a prefix, or of the prefill of the prefix and scoring."""
    time.sleep(PAUSE)
    changes = {"decoded": DECODED, series.size: value}
    measured = peer.run(series.workload, round_, **changes)
    prefix = measured.prefix_seconds or 0.0
    return measured.seconds + (prefix if series.workload == "score" else 0.0)


def limit_of(sizes: Sizes, series: Series, limits: Limits) -> float:
    """Return the seconds that the machine needs at least for what `time_once` measures."""
    prefill = limit_seconds(sizes, "prefill", limits) if series.workload == "score" else 0.0
    return prefill + limit_seconds(sizes, series.workload, limits)


def measure(peers: list[Peer], sizes: Sizes, rounds: int, limits: Limits) -> list[dict[str, object]]:
    """Return a row per series, value and engine; the rounds of the engines alternate."""
    rows: list[dict[str, object]] = []
    for series in SERIES:
        for peer in peers:
            time_once(peer, series, series.values[0], 0)  # a first run warms the engine up
        for value in series.values:
            changed = replace(sizes, decoded=DECODED, **{series.size: value})
            count = count_tokens(changed, series.workload)
            running = [peer for peer in peers if peer.name == "genssd" or value in series.transformers_values]
            seconds_by_engine: dict[str, list[float]] = {peer.name: [] for peer in running}
            for round_ in range(1, 1 + rounds):
                for peer in running:
                    seconds_by_engine[peer.name].append(time_once(peer, series, value, round_))
            seconds_by_engine["limit"] = [limit_of(changed, series, limits)]
            for name, seconds in seconds_by_engine.items():
                rows.append(
                    {
                        "workload": series.workload,
                        "size": series.size,
                        "value": value,
                        "engine": name,
                        "seconds": round(median(seconds), 4),
                        "min": round(min(seconds), 4),
                        "max": round(max(seconds), 4),
                        "tokens_per_second": round(count / median(seconds), 2),
                    }
                )
                print(rows[-1], file=sys.stderr)
    return rows


def plot(rows: list[dict[str, object]], sizes: Sizes, path: Path) -> None:
    """Draw tokens per second against the size of every series, both axes logarithmic, into an image file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    styles = {
        "genssd": {"color": "#1f4e9c", "marker": "o"},
        "transformers": {"color": "#c0392b", "marker": "s"},
        "limit": {"color": "#777777", "linestyle": "--"},
    }
    names = {"limit": "the machine's limit"}
    figure, axes = pyplot.subplots(1, len(SERIES), figsize=(15, 4.6), layout="constrained")
    for axis, series in zip(axes, SERIES, strict=True):
        for engine, style in styles.items():
            points = [row for row in rows if row["size"] == series.size and row["engine"] == engine]
            axis.plot(
                [row["value"] for row in points],
                [row["tokens_per_second"] for row in points],
                label=names.get(engine, engine),
                **style,
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(series.values)
        for formatted in (axis.xaxis, axis.yaxis):
            formatted.set_major_formatter(ScalarFormatter())
            formatted.set_minor_formatter(NullFormatter())
        axis.set_title(series.title.format(**asdict(sizes)), fontsize=11)
        axis.set_xlabel(series.label)
        axis.grid(which="both", alpha=0.25)
    axes[0].set_ylabel("tokens per second")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--small", action="store_true", help="use a tiny model, to check this program; its times mean nothing"
    )
    parser.add_argument("--threads", type=int, default=available_cores(), help="number of threads of each engine")
    parser.add_argument(
        "--model-dir", type=Path, help="directory that keeps the model and the logs; default: a temporary one"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    name = "small" if options.small else "full"
    sizes = SIZES[name]
    with ExitStack() as stack:
        parent = options.model_dir or Path(stack.enter_context(TemporaryDirectory()))
        directory = ensure_model(parent.resolve(), name)
        limits = measure_limits(options.threads)
        peers = []
        for engine in ("genssd", "transformers"):
            peers.append(Peer(engine, sys.executable, directory, name, options.threads))
            stack.callback(peers[-1].close)
        rows = measure(peers, sizes, options.rounds, limits)
    for row in rows:
        print("{workload:7} {size:10} {value:5} {engine:13} {tokens_per_second:10.1f} tokens/s".format(**row))
    if options.json:
        report = {
            "command": f"python -m bench.engine.cpu_growth --rounds {options.rounds}"
            + (" --small" if options.small else ""),
            "machine": describe_machine(options.threads),
            "sizes": asdict(replace(sizes, decoded=DECODED)),
            "rounds": options.rounds,
            "limits": asdict(limits),
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.plot:
        plot(rows, sizes, options.plot)


if __name__ == "__main__":
    main()
