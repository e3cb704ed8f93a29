# The whole interface of a clone: git, make and python >= 3.11 (with venv) are all it needs. Nothing is written outside
# the clone but private temporary directories, removed at the end (Ray's sockets need a short path: where TMPDIR is long,
# one of them is in /tmp).
#
#   make demo        atlas -> corpus -> training, killed and continued -> release -> embedding, on real cells
#   make test        every test that is neither slow nor needs a GPU      make test-slow   the others (FULL=1: the longest too)
#   make check       ruff, types, import direction                        make format      what ruff can mend
#   make bench       the demo's stages, timed                             make gpu-check   training and release on a GPU
#   make bench-data  h5ad to corpus, beside other tools                   make bench-train  the loop, beside a bare step
#   make bench-loader  batches from disk, beside other loaders            make bench-model  a step, packed beside padded
#   make install     .venv with everything                                make clean       remove out/ and caches

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow check format bench bench-data bench-loader bench-model bench-train gpu-check clean

PYTHON ?= python3
VENV ?= .venv
PY := $(abspath $(VENV))/bin/python
STAMP := $(VENV)/.installed
SEED ?=
FULL ?=
ARGS ?=

# What these programs would put into a home goes here instead.
CACHE := $(CURDIR)/.cache
export PIP_CACHE_DIR := $(CACHE)/pip
export XDG_CACHE_HOME := $(CACHE)/xdg
export XDG_DATA_HOME := $(CACHE)/data
export MPLCONFIGDIR := $(CACHE)/matplotlib
export HF_HOME := $(CACHE)/huggingface
export TRITON_CACHE_DIR := $(CACHE)/triton
export TORCHINDUCTOR_CACHE_DIR := $(CACHE)/inductor
export TORCH_EXTENSIONS_DIR := $(CACHE)/torch-extensions
export TORCH_HOME := $(CACHE)/torch
export WANDB_CACHE_DIR := $(CACHE)/wandb
export WANDB_CONFIG_DIR := $(CACHE)/wandb
export WANDB_DATA_DIR := $(CACHE)/wandb
export NUMBA_CACHE_DIR := $(CACHE)/numba
export HYPOTHESIS_STORAGE_DIRECTORY := $(CACHE)/hypothesis
export PYTHONNOUSERSITE := 1
# Offline by choice: no telemetry, no hub.
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export WANDB_ERROR_REPORTING := false
# Threads that wait sleep: several processes share the cores of a small machine.
export OMP_WAIT_POLICY := PASSIVE

# Run a recipe with a private temporary directory and a home inside the clone; the exit status is the recipe's.
PRIVATE = export HOME="$(CACHE)/home" XDG_CONFIG_HOME="$(CACHE)/config"; mkdir -p "$$HOME"; \
	TMPDIR="$$(mktemp -d "$${TMPDIR:-/tmp}/scgpt-XXXXXX")"; export TMPDIR; trap 'rm -rf "$$TMPDIR"' EXIT;

help:
	@sed -n '5,12s/^# //p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "error: $(PYTHON) is Python "+ \
		sys.version.split()[0]+"; give a newer one: make install PYTHON=python3.11 (3.12 and 3.13 do too)")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments;" \
		"install its venv package (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --progress-bar off --quiet -c constraints.txt -e '.[all,dev]'
	@touch $(STAMP)

demo: install
	@$(PRIVATE) $(PY) -m launch.demo $(if $(SEED),--seed $(SEED)) $(ARGS)

test: install
	@$(PRIVATE) $(PY) -m pytest -m 'not slow and not system and not gpu' $(ARGS)

test-slow: install
	@$(PRIVATE) export SCGPT_FULL="$(FULL)"; $(PY) -m pytest -m '(slow or system) and not gpu' --durations=15 $(ARGS)

check: install
	@$(PRIVATE) $(PY) -m ruff check .; $(PY) -m mypy; $(PY) -m pytest tests/test_imports.py $(ARGS)

format: install
	@$(PY) -m ruff check --fix .

bench: install
	@$(PRIVATE) $(PY) -m launch.demo --out out/bench --fresh $(ARGS)

bench-data: install
	@$(PRIVATE) $(PY) benchmarks/data.py $(ARGS)

bench-loader: install
	@$(PRIVATE) $(PY) benchmarks/loader.py $(ARGS)

bench-model: install
	@$(PRIVATE) $(PY) benchmarks/model.py $(ARGS)

bench-train: install
	@$(PRIVATE) $(PY) benchmarks/train.py $(ARGS)

gpu-check: install
	@$(PRIVATE) $(PY) -m launch.demo --gpu $(ARGS)

clean:
	rm -rf out build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
