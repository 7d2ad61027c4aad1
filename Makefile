PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0

.PHONY: demo test lint format docs clean

$(VENV)/run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@ $(VENV)/run

demo: $(VENV)/run  ## Train a LoRA on the embedded model, without downloads
	$(BIN)/python -m trainer demo --seed $(SEED)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint  ## Lint, then every test
	$(BIN)/python -m pytest

docs: $(VENV)/dev  ## Write docs/configuration.md and docs/rewards.md from the settings themselves
	$(BIN)/python -m trainer.reference > docs/configuration.md
	$(BIN)/python -m trainer.reference rewards > docs/rewards.md

clean:
	rm -rf $(VENV) runs
