# make quickstart   train a small DeepSeek-VL through all stages on this machine and write a report
# make test         lint, types and every test that this machine can run
# make install      what both start with: a virtual environment with the pinned versions

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.megavl-installed
PYTEST_WORKERS ?= 2

.PHONY: install quickstart test lint types clean

install: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev,quickstart]'
	touch $@

quickstart: install
	$(BIN)/python examples/quickstart/run.py

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

clean:
	rm -rf runs build *.egg-info
