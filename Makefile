# `make run` and `make test` set everything up in .venv themselves; nothing is needed before them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PINS := $(VENV)/constraints.txt
DEMO_OUT ?= build/demo

# Where to take torch from, as a package index address: one with CPU builds saves the download of
# CUDA's libraries on a machine without a GPU. Empty: the index that pip is configured for.
TORCH_INDEX_URL ?=

# A process a core runs the tests, each a file at a time. The kernels' tests come second, since they
# need processes of their own (see tests/kernels/conftest.py).
WORKERS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
IN_PARALLEL = -n $(WORKERS) --dist loadfile

TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP_INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*)

.DEFAULT_GOAL := help
.PHONY: run test bench gpu tune format lint clean help
.DELETE_ON_ERROR:

run: $(STAMP) ## set up, then edit 100 facts into a small model and report (build/demo)
	@$(BIN)/pyeditfast demo --out $(DEMO_OUT)

test: lint ## set up, check format, lint and types, run the tests
	@$(BIN)/python -m pytest $(IN_PARALLEL)
	@$(BIN)/python -m pytest $(IN_PARALLEL) tests/kernels --ignore=tests/kernels/test_ahead_of_time.py

bench: $(STAMP) ## run the benchmarks, record them in bench/results, draw docs/benchmarks
	@mkdir -p build
	@$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/benchmark.json --timeout=3600
	@$(BIN)/python bench/record.py build/benchmark.json
	@$(BIN)/python bench/draw.py

# Neither sets anything up: a machine with a GPU has its own torch, and may be unable to install.
gpu: ## check and time everything on this machine's GPU (SIZE=small: about a minute)
	@$(PYTHON) -m bench.gpu --venv $(VENV) --size $(or $(SIZE),full)

tune: ## search the fastest configurations and backends for this machine's GPU (kernels/tuned_configs)
	@$(PYTHON) -m bench.gpu.tune --venv $(VENV)

format: $(STAMP) ## format the code and sort its imports
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lint: $(STAMP) ## check format, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

clean: ## remove .venv, the compiled module and every cache
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@rm -f pyeditfast/_csrc*.so pyeditfast/_csrc_missing.txt
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "pyeditfast needs Python 3.10 or later; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed; install Python's venv module (on Debian and Ubuntu: python3-venv)." >&2; \
		exit 1; }

# torch comes first and by its exact version: left to the resolver, other versions of it and their
# CUDA libraries may be fetched on the way. CUDA builds of torch insist on a triton of their own,
# so triton's pin holds only where torch brings none. The build takes its tools from .venv, so they
# are pinned too.
$(STAMP): $(SETUP_INPUTS) | $(BIN)/python
	@echo "Setting up $(VENV) (once, a few minutes)"
	@grep -v '^triton==' constraints.txt > $(PINS)
	@$(PIP) install -q $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) -c $(PINS) "$(TORCH)"
	@$(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit(any(r.startswith("triton") for r in m.requires("torch") or []))' \
		&& cp constraints.txt $(PINS) || true
	@$(PIP) install -q -c $(PINS) setuptools pybind11 cmake ninja
	@$(PIP) install -q -c $(PINS) --no-build-isolation -e ".[dev]"
	@$(BIN)/python -c 'from pyeditfast.extension import extension_status; print("Done:", extension_status())'
	@touch $@
