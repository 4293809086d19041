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

.PHONY: help ready demo test lint train-tiny bench

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

# The autoencoder, then an untrained text encoder, then the transformer together with the text encoder. A stopped stage
# goes on from its folder. On a GPU the trainers use it; on a CPU, WORKERS processes of one thread each.
train-tiny: ready
	$(RUN) OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=$(WORKERS) \
	    train_scripts/train_dcae.py --work_dir=output/tiny/dcae --minutes=$(MINUTES)
	[ -e output/tiny/text_encoder/config.json ] || \
	    $(PYTHON) train_scripts/create_text_encoder.py output/tiny/text_encoder
	$(RUN) bash train_scripts/train.sh configs/sana_config/tiny/Sana_tiny_img256.yaml --np=$(WORKERS) \
	    --vae.vae_pretrained=output/tiny/dcae/vae --text_encoder.text_encoder_name=output/tiny/text_encoder \
	    --train.early_stop_hours=$(shell awk "BEGIN {print $(MINUTES) / 60}") --work_dir=output/tiny/sana
	cp -r output/tiny/dcae/vae output/tiny/sana/model/
	@echo "the model: output/tiny/sana/model; its score: $(PYTHON) tools/score_scenes.py --model output/tiny/sana/model"

bench: ready
	HF_HUB_OFFLINE=1 $(PYTHON) tools/benchmark.py
