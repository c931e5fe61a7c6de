# Prerequisites: python >= 3.11 with venv, make, a C++20 compiler. The first target run creates .venv and installs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: demo test check bench wheel clean

demo: $(VENV)/.installed
	$(BIN)/genssd demo

test: $(VENV)/.installed-dev
	$(BIN)/pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/pytest bench -o python_files="bench_*.py" --benchmark-columns=median,iqr,rounds --benchmark-json=bench/results/kernels.json

# sdist -> wheel -> an environment that has nothing else of this tree -> the tests against what was installed
wheel: $(VENV)/.installed-dev
	rm -rf build/dist build/clean
	$(BIN)/python -m build --outdir build/dist .
	$(PYTHON) -m venv build/clean
	build/clean/bin/pip --disable-pip-version-check install -q -c constraints.txt torch
	build/clean/bin/pip --disable-pip-version-check install -q -c constraints.txt "$$(ls build/dist/*.whl)[test]"
	cp -r tests build/clean/tests && cp pyproject.toml build/clean/
	cd build/clean && bin/pytest -q -m "not slow and not source"

$(VENV)/.installed: $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist
