#!/usr/bin/env bash
# Installs the wheel of build/wheels that fits an interpreter, with what it requires and nothing else, into an
# environment of its own, without the sources and without a compiler, and uses it: every module is imported, then
# `genssd env`, a search with the pair of models that ships with genssd, and a page of it.
# usage: try_wheel.sh PYTHON [FOLDER]    FOLDER: the environment, build/try by default
# GENSSD_TRY_WHEELS: the folder of the wheels, build/wheels by default
# GENSSD_TRY_PACKAGES: a site-packages folder that has all other packages, which then are not installed
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 folder=$(realpath -m "${2:-build/try}") wheels=$(realpath "${GENSSD_TRY_WHEELS:-build/wheels}")
check=$PWD/scripts/check_installed.py
"$python" -m venv --clear "$folder"
pip=("$folder/bin/pip" --disable-pip-version-check)
# pip chooses the wheel by its tags; --no-index: no other genssd will do. Then it is installed by the name of its file
"${pip[@]}" download -q --no-deps --no-index --find-links "$wheels" --only-binary :all: --dest "$folder/wheel" genssd
if [[ -n ${GENSSD_TRY_PACKAGES:-} ]]; then
  echo "$GENSSD_TRY_PACKAGES" > "$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/others.pth"
  "${pip[@]}" install -q --no-deps --no-index --ignore-installed "$folder"/wheel/*.whl
else
  grep -v '^triton==' constraints.txt > "$folder/constraints.txt" # torch for CUDA asks for its own Triton
  "${pip[@]}" install -q --no-compile -c "$folder/constraints.txt" "$folder"/wheel/*.whl
  "${pip[@]}" check
fi
mkdir -p "$folder/empty" && cd "$folder"
export PATH="$folder/bin" # no compiler, no git, none of the sources
unset PYTHONPATH
if command -v cc gcc g++ clang > "$folder/empty/compilers"; then
  echo "a compiler is on PATH: $(< "$folder/empty/compilers")" >&2
  exit 1
fi
python -P "$check"
genssd env
pair=$(python -c "import genssd, pathlib; print(pathlib.Path(genssd.__file__).parent / 'distill/small_pair')")
printf '{"question": "12 + 30 + 25 + 11?", "answer": "78"}\n{"question": "41 + 17 + 20 + 36?", "answer": "114"}\n' > problems.jsonl
genssd select --teacher "$pair/teacher" --student "$pair/student" --data problems.jsonl --chunk.tokens 1 \
  --chunk.limit 64 --max-tokens 160 --output-dir "$folder/run"
python -c "import json; rows = [json.loads(line) for line in open('run/selections.jsonl')]; assert len(rows) == 2, rows"
genssd report --run run --output page.html
echo "the wheel works: $("$folder/bin/python" --version), $(python -c "import genssd; print(genssd.__file__)")"
