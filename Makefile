# Where the demo reads from and writes to; empty DATA means synthetic scans, made on the spot.
DATA    ?=
WEIGHTS ?= none
OUT     ?= runs/demo
PYTHON  ?= python3.11
BIN     := .venv/bin

.PHONY: demo test lint types lock clean

demo: .venv/installed
	$(BIN)/bt demo --data "$(DATA)" --weights "$(WEIGHTS)" --out "$(OUT)"

test: .venv/installed
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

# Rewrites every exact pin from pyproject.toml.
lock: .venv/installed
	$(BIN)/uv pip compile -q --upgrade --extra dev --python-version 3.11 --generate-hashes --no-header pyproject.toml -o requirements.lock

clean:
	rm -rf .venv runs

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check uv==0.13.8
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	@touch $@
