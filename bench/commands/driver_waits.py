"""What does it cost the driver to wait for a message, with more and more workers?

    python -m bench.commands.driver_waits [--json bench/results/driver_waits.json]

A byte is sent through one of N pipes and received, as a message of one of N workers is: with all pipes registered anew
for every message (`multiprocessing.connection.wait`, which the pool used before), and with a selector that is kept, as
`ProcessPool` waits. The two take turns. Times are the processor time of this process, which the load changes little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from multiprocessing import Pipe, connection
from multiprocessing.connection import Connection
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from genssd.engine.host.machine import read_cpu_name

MESSAGES = 300
"""Number of messages of one measurement."""


def measure(workers: int, rounds: int) -> dict[str, Any]:
    """Return the microseconds of a message with so many workers: the median, and every measurement."""
    pipes = [Pipe() for _ in range(workers)]
    selector = DefaultSelector()
    for near, _ in pipes:
        selector.register(near, EVENT_READ, near)
    times: dict[str, list[float]] = {"registered_anew": [], "kept": []}
    for _ in range(rounds):
        for way, values in times.items():
            begun = time.process_time()
            for number in range(MESSAGES):
                pipes[number % workers][1].send_bytes(b"x")
                if way == "kept":
                    ready = [key.data for key, _ in selector.select()]
                else:
                    ready = connection.wait([near for near, _ in pipes])
                (pipe,) = ready
                assert isinstance(pipe, Connection)
                pipe.recv_bytes()
            values.append(round((time.process_time() - begun) / MESSAGES * 1e6, 1))
    selector.close()
    for pair in pipes:
        for end in pair:
            end.close()
    return {"workers": workers} | {
        way: {"median_us": statistics.median(values), "us": values} for way, values in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8, 64, 256], help="numbers of workers")
    parser.add_argument("--rounds", type=int, default=5, help="number of measurements of each way")
    parser.add_argument("--json", type=Path, help="file of the result")
    options = parser.parse_args()
    most = 2 * max(options.workers) + 100  # both ends of every pipe
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    rows = []
    for workers in options.workers:
        rows.append(measure(workers, options.rounds) | {"load": round(os.getloadavg()[0], 1)})
        print(rows[-1], flush=True)
    if options.json is not None:
        command = " ".join(["python -m bench.commands.driver_waits", *sys.argv[1:]])
        result = {"command": command, "cpu": read_cpu_name(), "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
