# Two commands for a new machine: `make compare` and `make test`. Both make a virtual environment of their own first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: compare test docs matrix clean

compare: $(VENV)/.data  ## Train four mechanisms on embedded data and say which to take (under 10 minutes on 2 cores)
	$(BIN)/regard compare --budget 8m --output runs/compare

test: $(VENV)/.dev  ## Lint, check types and import order, and run the tests (under 15 minutes on 2 cores)
	$(BIN)/ruff check regard tests docs benchmarks
	$(BIN)/ruff format --check regard tests docs benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadgroup

docs: $(VENV)/.docs  ## Build the documentation into build/site
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

matrix: $(VENV)/.dev  ## Measure the verified matrix and the parity table of the documentation into docs/data
	$(BIN)/python docs/measure.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.data: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet -e '.[data]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
