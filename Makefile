# `make` alone lists the targets. Needs python 3.11 or newer with venv, make and git; nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# The interpreter that makes the environment: PYTHON=... decides, else 3.11 (what the pins were tested on).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Exported rather than pasted into a command, and taken by $(value), so that quotes, $ and ; stay text.
PROMPT ?= a shiny red cube on a blue ground
override PROMPT := $(value PROMPT)
export PROMPT
# More flags for `make run` and `make serve` (ARGS="--seed 7"), more for pytest (ARGS="-k door").
ARGS ?=

.PHONY: help setup run serve lint test test-fast bench docs wheel clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(STAMP) ## make .venv and install the pinned environment and this tree into it

# Runs again only when the pins or the packaging changed.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Try: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing requirements.txt (the first time takes a few minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile -r requirements.txt
	@# Compiled here on all cores, which pip would do on one. Some packages ship files for other Pythons:
	@# those do not compile, nobody imports them, and so the exit code says nothing.
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "ready: $(BIN)/gen --help"

run: setup ## draw one picture and print its path: make run PROMPT="a green cone behind a red ball"
	@$(BIN)/gen run pixart-sigma --prompt "$$PROMPT" $(ARGS)

serve: setup ## open the page at http://127.0.0.1:7860
	@$(BIN)/gen serve $(ARGS)

lint: setup ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

test: setup ## everything CI runs: Chromium if missing, ruff, the whole test suite
	@scripts/install_chromium.sh
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest $(ARGS)

test-fast: setup ## ruff and the tests without the slow ones
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

bench: setup ## measure seconds, memory and quality (see benchmarks/README.md)
	@$(BIN)/python benchmarks/run.py $(ARGS)

docs: setup ## write the generated documents again
	@$(BIN)/python scripts/write_docs.py

wheel: setup ## build dist/gen_studio-*.whl
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean: ## remove .venv, build products and caches (never weights, outputs or .train)
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	@find . -name __pycache__ -type d -not -path './.train/*' -prune -exec rm -rf {} +
