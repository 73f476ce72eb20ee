# Two commands: `make quickstart` and `make test`. See README.md.
# TORCH_INDEX: where torch comes from, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu for CPU-only wheels (about 200 MB
# instead of 3 GB on Linux). Empty: the default package index.
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS ?= 2

.PHONY: quickstart test check bench crash zoo security clean

quickstart: $(VENV)/.train
	$(BIN)/educe quickstart --dir quickstart

test: $(VENV)/.dev check
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev
	$(BIN)/ruff check educe tests tools bench
	$(BIN)/ruff format --check educe tests tools bench
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/house.py

bench: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow
	$(BIN)/python bench/cpu.py

crash: $(VENV)/.dev
	$(BIN)/python -m pytest -m crash -s

zoo: $(VENV)/.dev
	$(BIN)/python -m pytest -m zoo -s

$(VENV)/.base: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip setuptools wheel
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

$(VENV)/.train: $(VENV)/.base pyproject.toml
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.train

# The threats of docs/security.md, once more under `python -O` (tests/test_security_optimised.py), and the heavy ones.
security: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_security_*.py

clean:
	rm -rf $(VENV) build *.egg-info
