# The pipeline: `make preprocess train evaluate` (sets up .venv first), `make all`, `make test`, `make help`.
EXPERIMENT ?= demo
RAW_DIR ?=
GPUS ?=
ARGS ?=
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/installed-$(subst /,-,$(CONSTRAINTS))
# A folder may have any name: the shell gets it by the environment, unexpanded by make.
override export RAW_DIR := $(value RAW_DIR)
OVERRIDES = experiment=$(EXPERIMENT) $${RAW_DIR:+data.raw_dir="$$RAW_DIR"} $(ARGS)
PROCESSES = $(if $(GPUS),trainer.gpus=$(GPUS))

.PHONY: help setup preprocess train evaluate serialize inference all hardware reproduce test-fast test test-faults check clean
test-fast test test-faults: export PYTHONDONTWRITEBYTECODE :=  # they start hundreds of processes: compile once
.NOTPARALLEL:  # a stage reads what the one before it wrote
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo "variables: EXPERIMENT=$(EXPERIMENT) RAW_DIR=$$RAW_DIR GPUS=$(GPUS) ARGS='key=value ...' CONSTRAINTS=$(CONSTRAINTS) PIP_ARGS= PYTHON=$(PYTHON)"

setup: $(INSTALLED)  ## create .venv and install the pinned packages; again only when they change

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "installing into .venv (once; several GB of PyTorch, some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint $(CONSTRAINTS) $(PIP_ARGS) --editable '.[dev,lamb,notebook,slurm]'
	@rm -f .venv/installed-* && touch $@

preprocess: setup  ## raw images -> shards, index and manifest in data/
	$(BIN)/python preprocess.py $(OVERRIDES)

train: setup  ## shards -> weights in runs/
	$(BIN)/python train.py $(OVERRIDES) $(PROCESSES)

evaluate: setup  ## weights -> top-1 and top-5 over the whole validation set
	$(BIN)/python evaluate.py $(OVERRIDES) $(PROCESSES)

serialize: setup  ## evaluated weights -> ONNX files that agree with them
	$(BIN)/python serialize.py $(OVERRIDES)

inference: setup  ## the example notebook on that model: pictures, names, latencies
	$(BIN)/python -m recipe.stages.infer $(OVERRIDES)

all: preprocess train evaluate serialize inference  ## the whole recipe

hardware: setup  ## all that a machine with a GPU is wanted for: RAW_DIR=folder with CIFAR-10, or ARGS=--small to rehearse
	$(BIN)/python benchmarks/hardware.py $${RAW_DIR:+--raw-dir="$$RAW_DIR"} $(ARGS)

reproduce: setup  ## train in a temporary folder, delete all but the document, run it again: the same bits?
	PYTHON="$(CURDIR)/$(BIN)/python" tests/reproduce.sh $(EXPERIMENT)

test-fast: setup  ## the tests that start no process and train nothing: about a minute on 2 cores
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal -m "not slow and not process"

test: setup  ## every test but for the slow ones
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal -m "not slow"

test-faults: setup  ## the slow tests: commands that are killed, stopped and continued
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal -m slow

check: setup  ## linter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove caches and .venv; data/ and runs/ stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
