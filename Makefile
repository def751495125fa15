# Set-up, demonstration and checks, from a fresh clone on. Needs Python 3.11 or later with pip and venv; what is
# installed, fetched or cached stays in this folder (.venv, .cache).
#
# Which torch build comes depends on where pip looks: point pip's own settings at a folder or an index of CPU builds if
# a CUDA build is too large.

PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
TEST_WORKERS ?= 2
TEST_TIMEOUT ?= 300

# Others for `make test-floor` and `make test-newest`.
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)

export HF_HOME := $(CURDIR)/.cache/huggingface
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export XDG_CACHE_HOME := $(CURDIR)/.cache
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_CACHE_DIR := 1

.PHONY: demo test test-floor test-newest pytest lint format clean

demo: $(VENV)/installed
	rm -rf armt-demo
	$(BIN)/armt demo --out armt-demo

test: lint pytest

# The same tests on the oldest versions that pyproject.toml allows, and on the newest of everything that pip finds today.
test-floor:
	$(MAKE) pytest VENV=.venv-floor CONSTRAINTS=constraints-floor.txt

test-newest:
	rm -rf .venv-newest
	$(MAKE) pytest VENV=.venv-newest CONSTRAINTS=/dev/null

# On the CPU, and one torch thread to a worker: two workers with a thread pool each would fight over two cores.
pytest: $(VENV)/installed-dev
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -m "not gpu and not slow" -n $(TEST_WORKERS) --timeout $(TEST_TIMEOUT)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-floor .venv-newest .cache armt-demo .hypothesis .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: its pinned build is settled before anything that depends on it can ask for another one.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(if $(PYTHON),,$(error Python 3.11 or later with venv is needed; name one with `make PYTHON=...`))
	@echo "Setting up $(VENV) (once, some minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) torch
	@$(PIP) --quiet --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Adding the test tools to $(VENV)"
	@$(PIP) --quiet --editable '.[quant,serve]' --group dev
	@touch $@
