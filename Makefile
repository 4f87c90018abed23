# `make train_smoke` on a fresh clone does everything: environment, demo, result table, report.
# PYTHON=python3.12 chooses the interpreter; ARGS="run.seed=1" is handed on to the pipeline.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -q -n 2

.DEFAULT_GOAL := help
.PHONY: help setup train_smoke train_quick train_full test test-slow bench check lint types format tensorboard clean clean-runs

help:  ## list the targets
	@grep -hE '^[a-z_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(INSTALLED)  ## make the environment, once and again when the dependencies change

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' \
		|| { echo "Python 3.10 to 3.13 is needed; name one with PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

train_smoke: setup  ## base model, SFT, reward model, DPO, PPO and report in under two minutes
	$(BIN)/rlhf pipeline --config configs/demo.yaml $(ARGS)

train_quick: setup  ## the same with more data and steps, about five minutes
	$(BIN)/rlhf pipeline --config configs/demo_quick.yaml $(ARGS)

train_full: setup  ## the same again, about fifteen minutes
	$(BIN)/rlhf pipeline --config configs/demo_full.yaml $(ARGS)

test: setup  ## the fast tests
	$(PYTEST) -m "not slow"

test-slow: setup  ## the tests that train, build a wheel or run for minutes
	$(PYTEST) -m slow

bench: setup  ## the same work by us and by TRL in turn, and the ratios (about an hour; ARGS="--pairs 1 --work sft")
	$(BIN)/python bench/compare.py $(ARGS)

check: lint types test  ## everything that must be green before a commit

lint: setup  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy, strict, on rlhf/algo and rlhf/infra
	$(BIN)/mypy

format: setup  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tensorboard: setup  ## curves of all runs
	$(BIN)/tensorboard --logdir runs

clean:  ## remove caches and builds, keep runs and the environment
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

clean-runs:  ## remove all runs
	rm -rf runs
