# Prerequisites: python >= 3.11 with venv, make, a C++20 compiler. The first target run creates .venv and installs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
NATIVE_TESTS := $(foreach name,native native_arguments tiles attention device_table linear logprob sampling cache layers experts,tests/kernels/test_$(name).py) tests/engine/test_model.py
# what a wheel can break that its files do not show: the native kernels of its build, commands that start from another
# directory, the shipped pair, the pages. What does not depend on how the package came here is for `make test`
WHEEL_TESTS := $(addprefix tests/,test_package.py test_public_names.py cli/test_cli.py cli/test_light_imports.py \
	kernels/test_native.py kernels/test_native_arguments.py kernels/test_linear.py distill/test_small_pair.py \
	distill/doctor/test_verify.py distill/report/test_data.py)
# what no test runs here (GPU tests, benchmarks) is held to the names and arguments that exist, not to strict types
UNRUN := tests/kernels/gpu tests/engine/gpu tests/distill/pool/gpu bench examples docs/hooks
UNRUN_MYPY := --config-file= --cache-dir .mypy_cache/unrun --ignore-missing-imports --follow-imports silent --namespace-packages \
	--explicit-package-bases --check-untyped-defs \
	$(foreach code,arg-type misc override str-format union-attr,--disable-error-code $(code))
SOURCES := pyproject.toml constraints.txt $(wildcard csrc/*)

# compiled modules are kept: tests start processes, and pytest rewrites the assertions of a file once
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test check docs bench browser ray wheel wheels try-wheel sanitize clean

demo: $(VENV)/.installed
	$(BIN)/genssd demo

# a half of the tests on each core, then what is left over; torch's own threads would only be in each other's way
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=src:tests:. $(BIN)/mypy $(UNRUN_MYPY) $(UNRUN)
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.hpp bench/engine/peers/*.cpp tests/kernels/*.cpp

# the site in build/site; a link or an anchor that leads nowhere is an error
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# needs Chromium, which is installed where that is possible (Debian, as root), and no other package
browser: $(VENV)/.installed-dev
	bash scripts/install_browser.sh
	$(BIN)/pytest -rs tests/distill/report/test_browser.py

# what runs on Ray itself, which is in no other target: a local cluster, actors, an object storage
ray: $(VENV)/.installed-dev
	$(PIP) install -q -c constraints.txt -e ".[ray]"
	$(BIN)/pytest -n 0 tests/distill/pool/test_ray.py

bench: $(VENV)/.installed-dev
	$(BIN)/pytest bench -o python_files="bench_*.py" --benchmark-columns=median,iqr,rounds --benchmark-json=bench/results/kernels.json

# sdist -> wheel, as pip makes it for a user -> its files and metadata against the tree -> an environment that has what
# the wheel requires and nothing else: every module imports, a search and its page -> after its own packages those of the
# environment of the tests, which has pytest and all optional packages -> the tests that a wheel can fail
wheel: $(VENV)/.installed-dev
	rm -rf build/dist
	$(BIN)/python -m build --sdist --no-isolation --outdir build/dist .
	$(PIP) wheel -q --no-deps --wheel-dir build/dist build/dist/*.tar.gz
	$(BIN)/python scripts/check_wheel.py build/dist/*.whl
	GENSSD_TRY_WHEELS=build/dist bash scripts/try_wheel.sh "$(PYTHON)" build/clean
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$(build/clean/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/tests.pth"
	build/clean/bin/python -P scripts/check_installed.py
	cp -rp tests build/clean/tests && cp pyproject.toml build/clean/
	cd build/clean && OMP_NUM_THREADS=1 bin/python -m pytest -q --numprocesses auto --dist worksteal -m "not slow and not source" $(WHEEL_TESTS)

# the wheels of a release, into build/wheels: CPython 3.11 and later, x86-64 and 64-bit ARM (see the script)
wheels:
	$(PYTHON) scripts/build_wheels.py

# the wheel of build/wheels for this machine, in an environment of $(PYTHON) without a compiler on its PATH
try-wheel:
	bash scripts/try_wheel.sh "$(PYTHON)"

# the native kernels built with the address and undefined-behaviour sanitizers, under the tests that reach them; but for
# the one that limits the address space, which the sanitizer takes up itself
sanitize: $(VENV)/.installed-dev
	$(PYTHON) -m venv --clear build/sanitize
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$(build/sanitize/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dev.pth"
	build/sanitize/bin/pip --disable-pip-version-check install -q --no-deps --no-build-isolation -C build-dir=build/sanitize-core -C cmake.define.GENSSD_SANITIZE=address,undefined .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 build/sanitize/bin/python -m pytest -q --capture=sys -p no:cacheprovider -k "not runs_out_of_memory" $(NATIVE_TESTS)

# the wheel is built from other folders than the environment: what of the core is compiled already is not compiled again
$(VENV)/.installed $(VENV)/.installed-dev wheel: export CMAKE_CXX_COMPILER_LAUNCHER := $(CURDIR)/scripts/compile_once.py
$(VENV)/.installed $(VENV)/.installed-dev wheel: export GENSSD_OBJECTS := $(CURDIR)/build/objects

$(VENV)/.installed: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e .
	touch $@

# what is imported is compiled when it is: of all files of all packages pip would compile each one, for a minute
$(VENV)/.installed-dev: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile -c constraints.txt torch
	$(PIP) install -q --no-compile -c constraints.txt -e ".[dev]"
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist
