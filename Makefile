# make bench   set up, then a benchmark report in bench-report/ (about five minutes on two cores)
# make test    set up, then ruff, mypy and pytest
# make models  set up, then train every model, or MODELS="gpt bert", and write what they reached to
#              benchmarks/results/ and to the README's table; fails where a goal is missed
# make setup   the virtual environment in .venv with pinned requirements, and the build

PYTHON ?= python3
TORCH ?= torch==2.13.0
MODELS ?=
VENV := .venv
BIN := $(VENV)/bin

SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h)

.PHONY: bench test models setup build lint clean

bench: setup
	$(BIN)/leedl-fast bench --quick

test: setup lint
	$(BIN)/python -m pytest

models: setup
	$(BIN)/leedl-fast models $(MODELS) --run --readme README.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.built

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build bench-report *.egg-info leedl_fast/*.so leedl_fast/_build.json
