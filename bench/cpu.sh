#!/usr/bin/env bash
# Measures this CPU in one command: the products of every instruction set that it has beside torch and the limit, then
# the engine beside transformers; the other engines need environments of their own (bench/engine/cpu_peers.py --help).
#
#   bash bench/cpu.sh [RESULTS] [PYTHON] [--small]
#
# RESULTS: folder for cpu-products-<threads>.json and cpu-peers.json (default: bench/results). PYTHON: an interpreter
# that has genssd (default: .venv/bin/python). About ten minutes on two cores. --small runs everything on tiny sizes, to
# check it; the times mean nothing then.
set -eu
cd "$(dirname "$0")/.."
results=${1:-bench/results}
python=${2:-.venv/bin/python}
small=${3:-}
mkdir -p "$results"
grep -m1 "model name" /proc/cpuinfo
"$python" -c 'from genssd import _core; print("instruction sets:", *_core.instruction_sets())'
"$python" -m pytest -q -n 0 tests/kernels/test_tile_loops.py tests/kernels/test_tiles.py
"$python" -m bench.kernels.cpu_products $small --threads 1 --json "$results/cpu-products-1.json"
"$python" -m bench.kernels.cpu_products $small --threads "$(nproc)" --json "$results/cpu-products-$(nproc).json"
"$python" -m bench.engine.cpu_peers $small --workloads prefill decode score --json "$results/cpu-peers.json"
