# make demo and make test set up all that they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2
# Data sets prepared from packages stay in the checkout.
export TFDS_DATA_DIR ?= $(CURDIR)/.data

.PHONY: demo test test-all lint format clean reproduce \
    benchmark benchmark-traces benchmark-accuracy benchmark-scaling

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow"

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The tables and figures of docs/reproduction.md, by two processes that share
# the runs. Goes on where it was stopped.
REPRODUCTION := reproduction
reproduce: $(VENV)/.installed
	$(BIN)/python examples/reproduction/reproduce.py \
	    --directory=$(REPRODUCTION) --page=docs/reproduction.md

# These two make an environment of their own for PyTorch and the peers.
benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/steps.py

benchmark-traces: $(VENV)/.installed
	$(BIN)/python benchmarks/traces.py

benchmark-accuracy: $(VENV)/.installed
	$(BIN)/python benchmarks/accuracy.py

benchmark-scaling: $(VENV)/.installed
	$(BIN)/python benchmarks/scaling.py

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), \
	    "Python 3.10 to 3.13 is needed, for example: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-torch .data build *.egg-info
