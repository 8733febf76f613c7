PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench

help: ## Show this list.
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 14

demo: $(INSTALLED) ## Train a network on handwritten digits over four devices.
	$(BIN)/python examples/digits.py

test: $(INSTALLED) ## Prove the promises.
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED) ## Check format, style and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED) ## Measure errors, speed and memory against other libraries.
	$(BIN)/python -m pip install --quiet --editable ".[benchmarks]"
	$(BIN)/python benchmarks/accuracy.py --out benchmarks/results/accuracy.md
	$(BIN)/python -m benchmarks.speed --out benchmarks/results
	$(BIN)/python -m benchmarks.models --out benchmarks/results
	$(BIN)/python -m benchmarks.stack --out benchmarks/results
	$(BIN)/python benchmarks/scaling.py --out benchmarks/results/scaling.md

# Made once, and anew when the dependencies change.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
