# Every target sets itself up: `make translate` or `make test` on a clean clone is all it takes.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup translate paper test lint package clean

help:
	@echo "make translate   train a small English-German Transformer with FNGD on the embedded corpus (CPU, minutes)"
	@echo "make paper       the paper's comparison on one CUDA device, in MINUTES=25, from a folder DATA=...; again to go on"
	@echo "make test        run the tests"
	@echo "make lint        formatter, linter, type checker"
	@echo "make package     build the sdist and the wheel, and try both in an environment of their own"
	@echo "make setup       create $(VENV) with the pinned versions of constraints.txt"
	@echo "make clean       remove what the targets above made"

setup: $(READY)

# torch first and by its exact version, so that nothing below resolves it anew.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("hf_fngd needs Python 3.11 or newer: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[recipes,test]'
	touch $@

# Two settings of glibc's allocator: without them it gives the memory of the logits back after every step and has
# to ask for it again, a quarter of a step's time on a CPU.
translate: setup
	MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=4000000000 $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --gpu_ids 0 --mixed_precision no --dynamo_backend no \
		recipes/translate.py --config recipes/configs/quickstart.yaml

paper: setup
	$(BIN)/python recipes/paper.py --minutes $(or $(MINUTES),25) $(if $(DATA),--dataset_name '$(DATA)')

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

package: setup
	PYTHON=$(PYTHON) .ci/package

clean:
	rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
