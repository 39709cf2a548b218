# Everything runs in .venv, which make builds by itself. `make help` lists the commands.

PYTHON  ?= python3
# The versions that are installed, a file of constraints/: default, oldest or newest. Each has an environment of its own.
SET     ?= default
# Processes for the tests: one a core; no more than 8, because each holds a PyTorch of its own.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); \
                   [ $$cores -lt 8 ] && echo $$cores || echo 8)
# Options of the demo, the examples and pytest: make demo DEMO="--cell gru", make test PYTEST="-x"
DEMO    ?=
EXAMPLES ?=
PYTEST  ?=

VENV  := .venv$(if $(filter-out default,$(SET)),-$(SET))
READY := $(VENV)/.ready
BIN   := $(VENV)/bin
SOURCES := kernels rnn_gpu tests perf examples docs

# Idle OpenMP threads must sleep: where they spin on busy cores, a call of 23 ms can stall for seconds.
export OMP_WAIT_POLICY := passive
# What a user's shell has set must choose neither the backend nor the mode of a run.
unexport RNN_GPU_AUTOTUNE RNN_GPU_BACKEND RNN_GPU_MEMORY TRITON_INTERPRET

# One thread a worker, so that the workers do not fight for the cores.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST)

.PHONY: help setup demo examples test test-oldest test-newest test-slow test-machine test-gpu lint format docs package clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## the environment, in .venv

demo: $(READY)  ## train a character language model on real text (about 75 seconds)
	$(BIN)/python examples/character_language_model.py $(DEMO)

# Each in turn, all of them even where one falls short, in a folder where they leave pictures and a checkpoint.
NAMES := $(filter-out common distributed_training,$(basename $(notdir $(wildcard examples/*.py))))

examples: $(READY)  ## solve a small real problem of each kind (some 15 minutes on two cores); build/examples
	@mkdir -p build/examples; short=; \
	for name in $(NAMES); do \
	    echo; echo "==== $$name"; \
	    (cd build/examples && $(abspath $(BIN))/python ../../examples/$$name.py $(EXAMPLES)) || short="$$short $$name"; \
	done; \
	if [ -n "$$short" ]; then echo; echo "fell short:$$short"; exit 1; fi

# Three runs, because compiled and interpreted kernels cannot share a process, and the machine's tests are interpreted
# ones on compiled kernels: a sample of them, and all of them in test-slow.
ON_MACHINE := RNN_GPU_TEST_MACHINE=1
MACHINE_TESTS := tests/test_kernels.py tests/test_sequences.py tests/test_layers_interpreted.py

test: $(READY)  ## all tests but the slow ones: compiled, interpreted, and on the machine for PTX
	@echo "All tests: about 15 minutes on two cores, less on more. A GPU is not needed; what needs one is skipped without."
	@$(TEST) -q --span 0:50 -m "not interpreted and not slow"
	@TRITON_INTERPRET=1 $(TEST) -q --span 50:80 -m "interpreted and not slow"
	@$(ON_MACHINE) $(TEST) -q --span 80:100 -m "interpreted and not slow" $(MACHINE_TESTS)

test-oldest:  ## `make test` with the oldest PyTorch and Triton that are tested (about 5 GB to set up)
	@$(MAKE) test SET=oldest

test-newest:  ## `make test` with the newest ones (about 5 GB to set up)
	@$(MAKE) test SET=newest

test-slow: $(READY)  ## the long sweeps
	$(TEST) -m "slow and not interpreted"
	TRITON_INTERPRET=1 $(TEST) -m "slow and interpreted"
	$(ON_MACHINE) $(TEST) -m "slow and interpreted" $(MACHINE_TESTS) tests/test_wavefront.py

test-machine: $(READY)  ## the compiled kernels on the machine for PTX, all of it
	$(ON_MACHINE) $(TEST) -m interpreted $(MACHINE_TESTS) tests/test_wavefront.py

test-gpu: $(READY)  ## only what needs a GPU
	$(TEST) -m gpu

lint: $(READY)  ## check the style, and the types of what users call
	$(BIN)/ruff check $(wildcard $(SOURCES))
	$(BIN)/ruff format --check $(wildcard $(SOURCES))
	$(BIN)/mypy

format: $(READY)  ## mend the style
	$(BIN)/ruff check --fix $(wildcard $(SOURCES))
	$(BIN)/ruff format $(wildcard $(SOURCES))

docs: $(READY)  ## the pages of docs/ as a site, in build/docs; needs no network
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

package: $(READY)  ## build wheel and source archive in dist/ (tests/test_package.py tries them)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

clean:  ## remove the environment, builds, caches and checkpoints
	rm -rf .venv .venv-oldest .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis *.pt
	find $(wildcard $(SOURCES)) -name __pycache__ -type d -prune -exec rm -rf {} +

# The constraints hold PyTorch to one version in every call: without them pip may fetch another, gigabytes each.
# setuptools comes first and the build is not isolated: then the build obeys the constraints too.
$(READY): pyproject.toml constraints/$(SET).txt constraints/tools.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints/$(SET).txt setuptools
	$(BIN)/python -m pip install -c constraints/$(SET).txt --no-build-isolation -e ".[test,perf,examples,docs,dev]"
	@touch $@
