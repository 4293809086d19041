# make demo | test | lint | docs | train-tiny | bench. Every target installs what it needs first (environment_setup.sh).
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
SEED ?= 0
DCAE_STEPS ?= 1100
STEPS ?= 8400
TINY ?= output/tiny
TINY_OPTIONS ?=
BENCH ?=
DCAE_OPTIONS ?=
RUN := PATH="$(dir $(abspath $(shell command -v $(PYTHON) || echo $(PYTHON)))):$$PATH"

.PHONY: help ready demo test test-slow lint docs train-tiny bench

help:
	@echo "make demo        pictures by the bundled model, on the CPU, without a network"
	@echo "make test        install, then run the whole test suite (WORKERS=$(WORKERS))"
	@echo "make test-slow   the tests that take minutes: runs that are killed, whole example runs"
	@echo "make lint        ruff, its formatter, and mypy"
	@echo "make docs        the documentation site: output/site"
	@echo "make train-tiny  train the bundled model anew (steps: DCAE_STEPS=$(DCAE_STEPS), STEPS=$(STEPS); SEED=$(SEED))"
	@echo "make bench       speed of this machine against diffusers, with tables and plots (BENCH='--suite quick')"

ready:
	@$(SETUP)

demo: ready
	HF_HUB_OFFLINE=1 $(PYTHON) scripts/inference.py --work_dir=output/demo

# One thread a worker, so that workers do not fight for cores and CPU results are the recorded ones.
test: ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -n $(WORKERS) $(TESTS)

# Runs killed at random moments, whole example runs: minutes each. The continuous integration runs them too.
test-slow: ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -n $(WORKERS) -m slow $(TESTS)

lint: ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# The pages need no server; their search does: python -m http.server -d output/site
docs: ready
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

# The autoencoder, then an untrained text encoder, then the transformer together with the text encoder. A stopped stage
# goes on from its folder. On a GPU the trainers use it; on a CPU, WORKERS processes of one thread each. The lengths are
# numbers of steps, so the same SEED and WORKERS give the same weights on the same machine.
train-tiny: ready
	$(RUN) OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=$(WORKERS) train_scripts/train_dcae.py \
	    --work_dir=$(TINY)/dcae --steps=$(DCAE_STEPS) --seed=$(SEED) $(DCAE_OPTIONS)
	[ -e $(TINY)/text_encoder/config.json ] || $(PYTHON) train_scripts/create_text_encoder.py $(TINY)/text_encoder
	$(RUN) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 bash train_scripts/train.sh configs/sana_config/tiny/Sana_tiny_img256.yaml \
	    --np=$(WORKERS) --vae.vae_pretrained=$(TINY)/dcae/vae --text_encoder.text_encoder_name=$(TINY)/text_encoder \
	    --train.seed=$(SEED) --train.extra.max_steps=$(STEPS) --work_dir=$(TINY)/sana $(TINY_OPTIONS)
	rm -rf $(TINY)/sana/model/vae && cp -r $(TINY)/dcae/vae $(TINY)/sana/model/
	@echo "the model: $(TINY)/sana/model; its score: $(PYTHON) tools/score_scenes.py --model $(TINY)/sana/model"

bench: ready
	HF_HUB_OFFLINE=1 $(PYTHON) -m tools.bench $(BENCH)
