# make demo and make test set up all that they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2
export REPOSITORY_URL ?=
# Data sets prepared from packages stay in the checkout.
export TFDS_DATA_DIR ?= $(CURDIR)/.data

.PHONY: demo test test-all test-floor test-newest lint format clean reproduce \
    reproduce-images \
    benchmark benchmark-traces benchmark-accuracy benchmark-scaling \
    gpu-programs gpu-check dist docs types \
    bazel-targets bazel-lock lint-bazel test-bazel

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow or not slow"

# The same tests with the lowest versions that setup.cfg declares, and with the
# newest ones, each in an environment of its own: make PYTHON=python3.10
# test-floor.
test-floor test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest -n 2 --dist worksteal

.venv-floor/.installed .venv-newest/.installed: .venv-%/.installed: \
    setup.cfg pyproject.toml tests/floor.py
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet --upgrade \
	    --upgrade-strategy eager --editable ".[dev]" \
	    $(if $(filter floor,$*),$$($(PYTHON) tests/floor.py))
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The site, in site/; a dead link or an unknown name is an error. MkDocs has no
# need of TensorFlow: it reads docstrings from the source.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict

.venv-docs/.installed: setup.cfg tests/floor.py
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade pip
	.venv-docs/bin/python -m pip install --quiet \
	    $$($(PYTHON) tests/floor.py --extra=docs)
	touch $@

# The sdist, and the wheel made from it, which has to work in an environment of
# nothing else.
dist:
	rm -rf dist .venv-dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --upgrade pip build
	.venv-dist/bin/python -m build
	$(PYTHON) -m venv --clear .venv-dist
	.venv-dist/bin/python -m pip install --quiet --upgrade pip
	.venv-dist/bin/python -m pip install --quiet dist/*.whl
	.venv-dist/bin/python -m pip check
	.venv-dist/bin/python tests/installed.py

# The tables and figures of docs/reproduction.md, by two processes that share
# the runs. Goes on where it was stopped.
REPRODUCTION := reproduction
reproduce: $(VENV)/.installed
	$(BIN)/python examples/reproduction/reproduce.py \
	    --directory=$(REPRODUCTION) --page=docs/reproduction.md

# The same on real images; goes on where it was stopped, which is as well: it
# takes days on a CPU.
reproduce-images: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet cleanlab
	for part in images images_resnet; do \
	    $(BIN)/python examples/reproduction/reproduce.py --part=$$part \
	        --directory=$(REPRODUCTION)-$$part --page=docs/reproduction.md \
	        || exit; \
	done

# These two make an environment of their own for PyTorch and the peers.
benchmark: $(VENV)/.installed
	$(BIN)/python benchmarks/steps.py

benchmark-traces: $(VENV)/.installed
	$(BIN)/python benchmarks/traces.py

benchmark-accuracy: $(VENV)/.installed
	$(BIN)/python benchmarks/accuracy.py

benchmark-scaling: $(VENV)/.installed
	$(BIN)/python benchmarks/scaling.py

# Exports the steps of fit for a GPU machine; see benchmarks/README.md.
gpu-programs: $(VENV)/.installed
	$(BIN)/python benchmarks/gpu/export.py
	$(BIN)/python benchmarks/gpu/export.py --training

# Compares what they compute through JAX, on this machine, with TensorFlow.
gpu-check: gpu-programs .venv-jax/.installed
	.venv-jax/bin/python benchmarks/gpu/card.py --no_torch --threads=2 \
	    --parts check_all --reserve=0 --seconds=36000 \
	    --output=.gpu-programs/checked

# JAX 0.11.2 is what benchmarks/gpu is written for; it needs Python 3.12.
.venv-jax/.installed:
	$(PYTHON) -m venv .venv-jax
	.venv-jax/bin/python -m pip install --quiet numpy \
	    "jax==0.11.2; python_version >= '3.12'" \
	    "jax==0.10.2; python_version < '3.12'"
	touch $@

# Without a warning of setuptools's that is for all editable installations.
$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), \
	    "Python 3.10 to 3.13 is needed, for example: make PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet \
	    --editable ".[dev]"
	touch $@

# Whether types of public names are known, as far as they are ours.
types: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet pyright
	$(BIN)/python tools/check_types.py

# The BUILD files, when imports have changed; `make test` compares them.
bazel-targets:
	$(PYTHON) tools/bazel_targets.py

# The newest versions of what Bazel's targets and tests need, for all Pythons.
bazel-lock: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --upgrade --universal \
	    --python-version=3.10 --extra=test --generate-hashes \
	    --custom-compile-command="make bazel-lock" \
	    --output-file=requirements_lock.txt setup.cfg

# With Node.js, which runs the program.
BAZEL_FOLDERS := benchmarks docs examples keras_fisher tests tools
lint-bazel:
	npx --yes @bazel/buildifier@8.2.1 -mode=check -lint=warn \
	    MODULE.bazel WORKSPACE BUILD \
	    $$(find $(BAZEL_FOLDERS) -name BUILD -or -name "*.bzl")

# With Debian's Bazel, by WORKSPACE: apt install bazel-bootstrap. It takes
# packages from .venv-bazel, and nothing from the network. All targets are built,
# and of the tests those are run that BAZEL_TESTS names: //tests/... are all.
BAZEL_TESTS ?= //tests/_common/... //tests/_tensorboard/... \
    //tests/tools/... //tests:test_architecture //tests:test_bazel
test-bazel: .venv-bazel/.installed
	bazel build //...
	bazel test --local_test_jobs=1 $(BAZEL_TESTS)

.venv-bazel/.installed: requirements_lock.txt
	$(PYTHON) -m venv .venv-bazel
	.venv-bazel/bin/python -m pip install --quiet --upgrade pip
	.venv-bazel/bin/python -m pip install --quiet \
	    --requirement requirements_lock.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-bazel .venv-floor .venv-newest \
	    .venv-torch .venv-jax .venv-dist .venv-docs .gpu-programs .data build dist site *.egg-info
