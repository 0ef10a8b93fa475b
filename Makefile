# make quickstart: train on digits, sample, classify.   make test: the tests.   make gpu-check: a CUDA device measured.
# Each makes the environment it needs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: quickstart test test-compiler test-faults test-demo gpu-check lint docs dist

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/python examples/quickstart.py

# Sums over several threads depend on their number, and the tests start processes of their own: one thread each.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m "not full_compiler and not faults and not demo"

# What takes minutes of the code generator: the compiled training step.
test-compiler: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m full_compiler

# Kills, full disks and damaged images: a line each; see docs/security.md.
test-faults: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup -v -m faults tests/faults

# The demo in a headless browser: skipped where Chromium is missing (on Debian: apt-get install -y chromium).
test-demo: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m demo tests/demo

# Gradients, speed, memory and sharding on a CUDA device, into gpu_check.json, in at most 9 minutes.
gpu-check: $(VENV)/installed
	$(BIN)/python -m latent_egc.measuring.gpu_check

# mypy looks at the package as it is installed, with pipelines/ in it: build/typed/ shows it so, by links.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typed/latent_egc
	ln -sfn $(CURDIR)/latent_egc/* $(CURDIR)/pipelines build/typed/latent_egc/
	$(BIN)/mypy

# What a release uploads, into dist/: a wheel, and an sdist from which the tests run.
dist: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# The site into docs/_build/html; a warning is an error.
docs: $(VENV)/installed
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -b html docs docs/_build/html
