PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
JOBS ?= 2
COMFYUI_PATH ?= $(HOME)/comfy/ComfyUI
export COMFYUI_PATH

# Where ComfyUI is found, the tests run in it; else they say so.
COMFYUI_REQUIREMENTS := $(patsubst %,-r %,$(wildcard $(COMFYUI_PATH)/requirements.txt))

.PHONY: demo test test-gpu lint format docs clean

$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements-dev.txt $(COMFYUI_REQUIREMENTS)
	touch $@ $(VENV)/run

demo: $(VENV)/run  ## Train a LoRA on the embedded model, without downloads
	$(BIN)/python -m trainer demo --seed $(SEED)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint  ## Lint, then every test, in JOBS processes of about 3 GiB each
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test-gpu: $(VENV)/dev  ## What only a GPU can show; gpu.jsonl keeps the figures, benchmarks/gpu.py --report prints them
	$(BIN)/python -m pytest -m gpu -rs

docs: $(VENV)/dev  ## Write the pages and tables of settings, rewards and kernels from the code itself
	$(BIN)/python -m tools.reference > docs/configuration.md
	$(BIN)/python -m tools.reference rewards > docs/rewards.md
	$(BIN)/python -m tools.reference load-reward > web/docs/DanceGRPO_LoadReward.md
	$(BIN)/python -m tools.reference kernels

clean:
	rm -rf $(VENV) runs
