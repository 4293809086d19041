# make demo | test | lint | train-tiny | bench. Every target installs what it needs first (environment_setup.sh).
# An active conda environment made by environment_setup.sh is used; else .venv. PYTHON=... uses another one as it is.
ifdef PYTHON
SETUP := true
else ifneq ($(wildcard $(CONDA_PREFIX)/.sana-environment),)
PYTHON := $(CONDA_PREFIX)/bin/python
SETUP := ./environment_setup.sh $(CONDA_DEFAULT_ENV)
else
PYTHON := .venv/bin/python
SETUP := ./environment_setup.sh
endif
WORKERS ?= 2
MINUTES ?= 60
RUN := PATH="$(dir $(abspath $(shell command -v $(PYTHON) || echo $(PYTHON)))):$$PATH"

.PHONY: help ready demo test lint types train-tiny bench

help:
	@echo "make demo        pictures by the bundled model, on the CPU, without a network"
	@echo "make test        install, then run the whole test suite (WORKERS=$(WORKERS))"
	@echo "make lint        ruff, its formatter, and mypy"
	@echo "make train-tiny  train the bundled model anew (MINUTES=$(MINUTES) for each of its stages)"
	@echo "make bench       time and memory of the bundled model"

ready:
	@$(SETUP)

demo: ready
	HF_HUB_OFFLINE=1 $(PYTHON) scripts/inference.py --work_dir=output/demo

# One thread a worker, so that workers do not fight for cores and CPU results are the recorded ones.
test: ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -n $(WORKERS) $(TESTS)

lint: ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: ready
	HF_HUB_OFFLINE=1 $(PYTHON) tools/benchmark.py
