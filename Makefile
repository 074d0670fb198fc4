# `make help` lists the targets. The environment lives in .venv/, data in data/, trained models in runs/.

PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
READY := .venv/.ready
OLDEST := .venv-oldest
SCENES := data/scenes/train/conversations.json
# What an LLM that can already talk learns from: nothing else than pictures.
SCENES_FOR_LLM := data/scenes_no_small_talk/train/conversations.json
# On a CPU two processes of one thread train the small model nearly twice as fast as one, and two threads gain little.
PROCESSES := $(if $(shell command -v nvidia-smi 2>/dev/null),1,2)
# What `make demo` trains: tiny or smollm2. The folder of its configs, and of its runs.
MODEL := tiny
STAGE2 = runs/$(PARTS)/stage2/manifest.json
PARTS := $(patsubst smollm2,smollm2-135m,$(MODEL))
$(if $(filter tiny smollm2,$(MODEL)),,$(error MODEL=$(MODEL) cannot be trained by `make demo`; allowed: tiny, smollm2))

# Where bytecode is not written, every process compiles torch and the rest anew, which is most of the time it takes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := setup
.PHONY: setup demo test test-oldest bench docs gpu-wheels lint format weights requirements clean help
.DELETE_ON_ERROR:
# A checkpoint is written in one move, so one that is there is whole, even when make is interrupted right then.
.PRECIOUS: runs/%/stage1/manifest.json runs/%/stage2/manifest.json

setup: $(READY) ## install everything into .venv/

demo: setup $(if $(wildcard $(STAGE2)),,$(STAGE2)) ## train a model where none is there, open the page; MODEL=smollm2
	$(BIN)/mmllm demo runs/$(PARTS)/stage2

# A file's tests stay in one process, which makes what they share once, and the slowest files come first; they are
# measured anew by PYTEST=--store-durations. The models of the tests are small: more threads than idle cores only wait
# for each other. One process more than cores works while others wait for what they have started.
WORKERS = $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')
PYTEST_RUN := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: lint ## lint, type-check and run the tests; PYTEST="-k chat" selects
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python $(PYTEST_RUN) $(PYTEST)

# What other versions of torch, transformers and peft break first. Old packages are for Python 3.11 and 3.12.
OLDEST_TESTS := $(addprefix tests/,$(addsuffix .py,test_versions checkpoint/test_folder model/test_processor \
	model/test_vlm model/test_language training/test_loop training/test_lora optimizers/test_optim interop/test_hf_llava))

test-oldest: $(OLDEST)/.ready ## the tests of models, training and export with the oldest versions, in .venv-oldest/
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(OLDEST)/bin/python $(PYTEST_RUN) -p no:cacheprovider $(OLDEST_TESTS)

bench: setup ## side-by-side measurements into bench/results/
	$(BIN)/python -m bench

docs: setup ## build the documentation into site/, without network; settings and Python from the code
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --clean
	@echo site/index.html

gpu-wheels: $(BIN)/uv ## bring what `python -m bench gpu` needs on a machine without network into bench/gpu_wheels/
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
		--platform manylinux_2_17_x86_64 --dest bench/gpu_wheels --requirement bench/gpu_packages.txt
	du -sh bench/gpu_wheels

lint: setup ## check format, style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: setup ## format, and fix what can be fixed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

weights: setup ## train the small backbones anew, from random weights, into weights/ (about 4 hours on one core)
	$(BIN)/mmllm train configs/tiny/warmup_language.yaml
	$(BIN)/mmllm train configs/tiny/warmup_language_pairs.yaml
	$(BIN)/mmllm train configs/tiny/warmup_language_words.yaml
	$(BIN)/mmllm train configs/tiny/warmup_language_grids.yaml
	$(BIN)/mmllm train configs/tiny/warmup_language_names.yaml
	$(BIN)/mmllm train configs/tiny/warmup_language_absent.yaml
	cd runs/tiny/warmup_language_absent && cp config.json generation_config.json model.safetensors chat_template.jinja \
		tokenizer.json tokenizer_config.json metrics.json log.jsonl train_loss.png ../../../weights/tiny-language/
	$(BIN)/mmllm train configs/tiny/warmup_vision.yaml
	$(BIN)/mmllm train configs/tiny/warmup_vision_fonts.yaml
	$(BIN)/mmllm train configs/tiny/warmup_vision_charts.yaml
	cd runs/tiny/warmup_vision_charts && cp open_clip_config.json open_clip_model.safetensors chat_template.jinja \
		tokenizer.json tokenizer_config.json metrics.json log.jsonl train_loss.png ../../../weights/tiny-vision/

PIN := $(BIN)/uv pip compile pyproject.toml --all-extras --universal --no-annotate --no-emit-index-url --quiet \
	--custom-compile-command "make requirements"
requirements: $(BIN)/uv ## pin the versions that are installed again; UPGRADE=--upgrade moves them to the newest
	$(PIN) $(UPGRADE) --output-file requirements.txt
	$(PIN) $(UPGRADE) --resolution lowest-direct --output-file requirements-oldest.txt

clean: ## remove .venv/, .venv-oldest/ and caches; data/ and runs/ stay
	rm -rf .venv $(OLDEST) .mypy_cache .pytest_cache .ruff_cache build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, \
	$(PYTHON) is {sys.version.split()[0]}; name another one with make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

$(READY): requirements.txt tests/parts.txt pyproject.toml | $(BIN)/uv
	$(BIN)/uv pip sync --compile-bytecode --python $(BIN)/python requirements.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --target .venv/parts --requirement tests/parts.txt
	@touch $@

$(OLDEST)/.ready: requirements-oldest.txt tests/parts.txt pyproject.toml | $(BIN)/uv
	$(PYTHON) -m venv --clear $(OLDEST)
	$(BIN)/uv pip sync --python $(OLDEST)/bin/python requirements-oldest.txt
	$(BIN)/uv pip install --python $(OLDEST)/bin/python --no-deps --editable .
	$(BIN)/uv pip install --python $(OLDEST)/bin/python --no-deps --target $(OLDEST)/parts --requirement tests/parts.txt
	@touch $@

# What follows is made once: order-only prerequisites (behind the bar) are made before it, but never make it anew.
# Training that was interrupted goes on where it stopped.
$(SCENES): | $(READY)
	$(BIN)/mmllm scenes data/scenes --train 10000 --val 500 --seed 0

$(SCENES_FOR_LLM): | $(READY)
	$(BIN)/mmllm scenes data/scenes_no_small_talk --train 6000 --val 500 --no-small-talk --seed 0

runs/tiny/stage1/manifest.json: | $(SCENES)
runs/smollm2-135m/stage1/manifest.json: | $(SCENES_FOR_LLM)
# SmolLM2 gains more from threads: a second process would cast and exchange all its weights at each step.
runs/smollm2-135m/%: PROCESSES := 1

runs/%/stage1/manifest.json:
	$(BIN)/mmllm train configs/$*/stage1.yaml --processes $(PROCESSES)

runs/%/stage2/manifest.json: | runs/%/stage1/manifest.json
	$(BIN)/mmllm train configs/$*/stage2.yaml --processes $(PROCESSES)
