# Every target sets up its own virtual environment on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test test-gate test-all lint check bench frontier gpu format clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	# torch first: the pin keeps pip on the build that this machine has, CPU or CUDA.
	$(BIN)/python -m pip install --quiet "torch>=2.11,<2.14"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

demo: setup            ## compile the shipped model and show what sparsity breaks and Sirius repairs
	$(BIN)/python examples/tally/demo.py

test: setup            ## the fast suite; neighbours share fixtures, so a worker gets a run of tests
	$(BIN)/python -m pytest -n auto --dist worksteal

test-gate: setup       ## what the gate runs besides: further cases, and compilations of seconds
	$(BIN)/python -m pytest -n auto --dist worksteal -m "gate and not slow"

test-all: setup        ## both of these and the slow tests, with more examples of each property
	$(BIN)/python -m pytest -n auto --dist worksteal --durations 20 -m "slow or not slow" --hypothesis-profile thorough

lint: setup            ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test test-gate  ## the gate

bench: setup           ## what this machine's CPU does with it: docs/results/cpu-*.md
	# llama.cpp is a row where it builds (it is compiled: some minutes, once).
	-$(BIN)/python -m pip install --quiet --group bench
	$(BIN)/python -m benchmarks.cpu

gpu:                   ## right and fast on this machine's GPU: docs/results/gpu-*.md; installs nothing
	PYTHONPATH=.:passes:runtime $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(FLAGS)

frontier: setup        ## what every sparse path answers and reads: docs/results/frontier.md
	$(BIN)/python -m benchmarks.frontier --problems 100

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
