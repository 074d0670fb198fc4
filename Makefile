# `make help` lists the targets. The environment lives in .venv/, data in data/, trained models in runs/.

PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
READY := .venv/.ready
OLDEST := .venv-oldest
SCENES := data/scenes/train/conversations.json
STAGE1 := runs/tiny/stage1/manifest.json
STAGE2 := runs/tiny/stage2/manifest.json

# Where bytecode is not written, every process compiles torch and the rest anew, which is most of the time it takes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := setup
.PHONY: setup demo test test-oldest bench docs gpu-wheels lint format weights requirements clean help
.DELETE_ON_ERROR:
# A checkpoint is written in one move, so one that is there is whole, even when make is interrupted right then.
.PRECIOUS: $(STAGE1) $(STAGE2)

setup: $(READY) ## install everything into .venv/

demo: setup $(if $(wildcard $(STAGE2)),,$(STAGE2)) ## train the small model where none is there, open the page
	$(BIN)/mmllm demo runs/tiny/stage2

# A file's tests stay in one process, which makes what they share once, and the slowest files come first; they are
# measured anew by PYTEST=--store-durations. The models of the tests are small: more threads than idle cores only wait
# for each other.
PYTEST_RUN := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

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

weights: setup ## train the small backbones anew, from random weights, into weights/ (about an hour on 2 cores)
	$(BIN)/mmllm train configs/tiny/warmup_language.yaml
	$(BIN)/mmllm train configs/tiny/warmup_language_pairs.yaml
	cd runs/tiny/warmup_language_pairs && cp config.json generation_config.json model.safetensors chat_template.jinja \
		tokenizer.json tokenizer_config.json figures.json log.jsonl train_loss.png ../../../weights/tiny-language/
	$(BIN)/mmllm train configs/tiny/warmup_vision.yaml
	cd runs/tiny/warmup_vision && cp open_clip_config.json open_clip_model.safetensors chat_template.jinja \
		tokenizer.json tokenizer_config.json figures.json log.jsonl train_loss.png ../../../weights/tiny-vision/

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
	$(BIN)/mmllm scenes data/scenes --train 20000 --val 500 --seed 0

$(STAGE1): | $(SCENES)
	$(BIN)/mmllm train configs/tiny/stage1.yaml

$(STAGE2): | $(STAGE1)
	$(BIN)/mmllm train configs/tiny/stage2.yaml
