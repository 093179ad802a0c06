# `make demo` or `make test` is all a fresh machine needs: it makes .venv and installs this package into it first.

# the first interpreter that is new enough
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo test lint format check-kernels

demo: $(STAMP)
	$(BIN)/surgery demo --out demo-output

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# compiles for GPUs, on any machine
check-kernels: $(STAMP)
	$(BIN)/python -m benchmarks.check_kernels
	$(BIN)/python -m benchmarks.check_mixed
	$(BIN)/python -m benchmarks.check_steps

$(STAMP): pyproject.toml constraints.txt scripts/install.py
	@test -n "$(PYTHON)" || { echo "surgery needs Python 3.10 or newer; name one with: make test PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) scripts/install.py $(VENV)
	@touch $@
