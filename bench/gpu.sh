#!/usr/bin/env bash
# On a machine with a GPU, which needs no network: build, run the GPU tests, time the operators beside those of other
# libraries and the candidates that no GPU has timed yet, and print a table. Under four minutes on 16 cores; a part that
# fails or runs out of time does not stop the others.
#
#   bash bench/gpu.sh [WHEELS] [RESULTS]
#
# WHEELS: folder of wheels, from which the packages that this Python lacks are installed; "" for none. RESULTS: folder
# of the logs and of gpu-probe.jsonl (default: bench/results), to which a row is added per operation, shape and
# implementation. Nothing is installed into this Python: packages go into a temporary folder.
set -u
cd "$(dirname "$0")/.." || exit 1
wheels=${1:-}
results=${2:-bench/results}
limit=235
failed=0
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$results"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
export CMAKE_BUILD_PARALLEL_LEVEL=16

part() { # NAME SECONDS COMMAND...: its output goes to RESULTS/gpu-NAME.log
    local name=$1 seconds=$2 left=$((limit - SECONDS))
    shift 2
    timeout "$((seconds < left ? seconds : left > 0 ? left : 1))" "$@" > "$results/gpu-$name.log" 2>&1
    local code=$?
    echo "== [$SECONDS s] $name: $([ $code = 0 ] && echo ok || echo "failed or out of time ($code)")"
    [ $code = 0 ] || { failed=1; tail -n 15 "$results/gpu-$name.log"; }
    return $code
}
install() { python3 -m pip --disable-pip-version-check install -q --no-index --no-deps --no-cache-dir --target "$site" "$@"; }
missing() { # the wheels of a folder whose package cannot be found
    python3 - "$1" << 'EOF'
import pathlib, sys
from importlib.metadata import PackageNotFoundError, version
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    try:
        version(wheel.name.split("-")[0])
    except PackageNotFoundError:
        print(wheel)
EOF
}
export -f install
export site

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
if [ -n "$wheels" ]; then
    mapfile -t packages < <(missing "$wheels")
    [ ${#packages[@]} = 0 ] || part wheels 30 bash -c 'install "$@"' _ "${packages[@]}"
fi
part build 60 bash -c 'install --no-build-isolation .' || exit 1
# the files with such tests alone: others need packages that a machine without a network may lack
mapfile -t files < <(grep -rl --include='*.py' 'mark\.gpu' tests)
part tests 100 python3 -m pytest -q -m gpu -n 12 -p no:cacheprovider --tb=short -rfE "${files[@]}"
tail -n 1 "$results/gpu-tests.log"
part probe 100 python3 -m bench.gpu.probe --seconds 75 --json "$results/gpu-probe.jsonl"
# what was written without a GPU at hand, beside what ships; the shortest times decide what ships next
part candidates 75 python3 -m bench.tuning.new_candidates --seconds 55 --json "$results/gpu-candidates.jsonl"
grep '"us"' "$results/gpu-candidates.log"
part streams 60 python3 -m bench.engine.search_gpu --streams 2 --prompts 32 --chunk 128 --max-tokens 256
tail -n 1 "$results/gpu-streams.log"
awk '/^operation  / { print machine; found = 1 } found { print } { machine = $0 }' "$results/gpu-probe.log"
exit $failed
