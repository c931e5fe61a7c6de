#!/usr/bin/env bash
# One command for a machine with a GPU, of at most ten minutes: the GPU tests, what memory the operators take, a sweep
# of configurations, the benchmarks. Rows land in bench/results/gpu-*.json; a part that fails does not stop the others.
#
#   bash bench/gpu.sh [RESULTS_DIRECTORY]
set -u
cd "$(dirname "$0")/.."
results=${1:-bench/results}
mkdir -p "$results"
failed=0
part() {
    local seconds=$1
    shift
    echo "== $*"
    timeout "$seconds" "$@" || { echo "== failed or out of time ($?): $*"; failed=1; }
}
part 150 python -m pytest -q -m gpu tests/kernels
part 45 python bench/memory.py --width 1024 --json "$results/gpu-memory.json"
part 120 python bench/sweep.py --json "$results/gpu-sweep.json"
part 240 python -m pytest -q bench -o python_files=bench_head.py --benchmark-columns=median,iqr,rounds \
    --benchmark-json="$results/gpu-kernels.json"
part 45 python -m pytest -q bench -o python_files=bench_forward.py --benchmark-columns=median,iqr,rounds \
    --benchmark-json="$results/gpu-forward.json"
exit $failed
