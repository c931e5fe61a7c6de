#!/usr/bin/env bash
# Run the GPU tests and benchmarks on a machine with a GPU, in sets of at most ten minutes each. Rows are written to
# bench/results/gpu-*.json; a part that fails does not stop the others.
#
#   bash bench/gpu.sh [RESULTS_DIRECTORY] [head|attention|tuning|tune]        default: head and attention
set -u
cd "$(dirname "$0")/.."
results=${1:-bench/results}
sets=${2:-head attention}
mkdir -p "$results"
failed=0
part() {
    local seconds=$1
    shift
    echo "== $*"
    timeout "$seconds" "$@" || { echo "== failed or out of time ($?): $*"; failed=1; }
}
bench() {
    part "$1" python -m pytest -q bench -o python_files="$2" --benchmark-columns=median,iqr,rounds \
        --benchmark-json="$results/$3"
}
for set in $sets; do
    case $set in
    head)
        part 150 python -m pytest -q -m gpu tests/kernels --ignore=tests/kernels/gpu/test_attention.py
        part 45 python -m bench.kernels.memory --width 1024 --json "$results/gpu-memory.json"
        part 120 python -m bench.tuning.head_tiles --json "$results/gpu-head-tiles.json"
        bench 240 bench_head.py gpu-kernels.json
        bench 45 bench_forward.py gpu-forward.json
        ;;
    attention)
        part 180 python -m pytest -q -m gpu tests/kernels/gpu/test_attention.py tests/engine
        bench 260 bench_attention.py gpu-attention.json
        part 150 python -m bench.engine.decode_step --json "$results/gpu-decode-step.json"
        ;;
    tuning)
        part 590 python -m bench.tuning.attention_tiles --json "$results/gpu-attention-tiles.json"
        ;;
    tune)
        part 240 python -m bench.tuning.tune_command --json "$results/gpu-tune.jsonl"
        ;;
    *)
        echo "no set is called $set" >&2
        failed=1
        ;;
    esac
done
exit $failed
