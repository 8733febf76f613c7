PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
KERNELS := .venv/.kernels
COMPILERS := .venv-compiled

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs evidence bench compiled

help: ## Show this list.
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(KERNELS) ## Train a network on handwritten digits over four devices.
	$(BIN)/python examples/digits.py

test: $(KERNELS) ## Run all tests; `pytest -n 2 -m "not slow"` skips the slow ones.
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED) ## Check format, style and types.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(KERNELS) ## Build the site, docs/_build/html/index.html; a warning is an error.
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs docs/_build/html

evidence: $(KERNELS) ## Test the claims of textbooks on real data, in less than half an hour.
	$(BIN)/python examples/evidence

bench: $(KERNELS) ## Measure errors, speed and memory against other libraries.
	$(BIN)/python -m pip install --quiet --editable ".[benchmarks]"
	$(BIN)/python -m benchmarks.accuracy --out docs/results/accuracy.md
	$(BIN)/python -m benchmarks.second_pass --out docs/results
	$(BIN)/python -m benchmarks.speed --out docs/results
	$(BIN)/python -m benchmarks.models --out docs/results
	$(BIN)/python -m benchmarks.nnx_models --out docs/results
	$(BIN)/python -m benchmarks.summary
	$(BIN)/python -m benchmarks.stack --out docs/results
	$(BIN)/python -m benchmarks.scaling --out docs/results/scaling.md

compiled: $(COMPILERS)/.installed ## Compile for an H100 and a TPU, and read what norms cost there.
	$(COMPILERS)/bin/python -m benchmarks.compiled --out docs/results

# Created once, and updated when the dependencies change.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

# CPU kernels, if they can be built. Without them norms are slower, but as exact. The build is not
# isolated, since it needs the headers of the installed jaxlib.
$(KERNELS): $(INSTALLED) $(wildcard native/*.toml native/CMakeLists.txt native/*/*.py native/src/*)
	@if command -v $${CXX:-c++} > /dev/null; then \
		$(BIN)/python -m pip install --quiet scikit-build-core cmake ninja && \
		$(BIN)/python -m pip install --quiet --force-reinstall --no-deps --no-build-isolation ./native || \
		echo "normjax-cpu cannot be built on this machine, so norms run without its kernels."; \
	else \
		echo "There is no C++ compiler, so norms run without the kernels of normjax-cpu."; \
	fi
	@touch $@

# The compilers, without the CUDA libraries, since no program runs. Their environment is separate,
# since JAX would search for their devices in every process.
$(COMPILERS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(COMPILERS)
	$(COMPILERS)/bin/python -m pip install --quiet --upgrade pip
	$(COMPILERS)/bin/python -m pip install --quiet jax flax dm-haiku equinox matplotlib
	version=$$($(COMPILERS)/bin/python -c 'import jax; print(jax.__version__)') && \
		$(COMPILERS)/bin/python -m pip install --quiet --no-deps libtpu nvidia-cuda-nvcc-cu12 \
		jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version
	$(COMPILERS)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@
