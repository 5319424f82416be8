# `make demo` and `make test` set themselves up: they need Python 3.11+, make and a C compiler, nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Waiting threads sleep: where they spin, whatever else runs on the machine makes torch several times slower.
export OMP_WAIT_POLICY ?= passive
# Who asks Python to keep no compiled modules would have each of the tests' processes compile torch's anew, for 20 s.
export PYTHONDONTWRITEBYTECODE =
export PYTHONPYCACHEPREFIX ?= $(CURDIR)/$(VENV)/pycache
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
# A file of tests is one process's, as its fixtures are; each process has a core.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "recap needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "setting up $(VENV) from requirements.lock …"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

setup: $(READY)  ## Install recap and what it needs into .venv

demo: $(READY)  ## The paper's experiment on drawn images and tiny models: 9 to 25 minutes on 2 cores
	@$(BIN)/recap world draw runs/world/shards
	@$(BIN)/recap world init runs/world/models
	@$(BIN)/recap run -c configs/tiny.toml

test: $(READY)  ## The quick tests: under 10 minutes
	@$(PYTEST) -m "not full"

test-full: $(READY)  ## All tests, with kills, browsers, servers and long runs: under 60 minutes
	@$(PYTEST)

bench: $(READY)  ## Images/s of fine-tuning, relabelling, training and evaluating against their peers, in one run each
	@$(BIN)/python tests/benchmarks/finetune.py
	@$(BIN)/python tests/benchmarks/relabel.py
	@$(BIN)/python tests/benchmarks/train.py
	@$(BIN)/python tests/benchmarks/evaluate.py

check: $(READY)  ## Lint and check the types
	@$(BIN)/ruff check .
	@$(BIN)/mypy

lock: $(READY)  ## Resolve the dependencies anew
	@$(BIN)/uv pip compile --quiet pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-header --upgrade --output-file requirements.lock

clean:  ## Delete the runs and the caches, not .venv
	@rm -rf runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup demo test test-full bench check lock clean
