# The commands of this project. Each works on a bare machine: the environment is made when it is missing.
#   make up      a leader, two followers and a proxy; Ctrl-C stops them       (ARGS="app.db --followers 3")
#   make test    lint, types, and the tests with coverage                     (ARGS="tests/formats -k wal")
#   make lint    ruff and mypy only
#   make bench   the ratios of docs/performance.md, measured on this machine  (ARGS="--quick writes")
#   make soak    the minutes-long proofs on real processes
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=

.PHONY: help up test lint bench soak clients clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

up: $(STAMP)
	$(BIN)/walship up $(ARGS)

test: lint clients
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m bench $(ARGS)

soak: $(STAMP) clients
	$(BIN)/python -m pytest -m soak -s --timeout=3600 -o faulthandler_timeout=3500 $(ARGS)

# The npm client that the tests and examples talk through; without node those tests say that they are skipped.
clients: $(STAMP)
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory examples/node/node_modules/.installed; \
	 else echo "npm is not here: tests with the JavaScript client will be skipped"; fi

examples/node/node_modules/.installed: examples/node/package.json
	cd examples/node && npm install --no-audit --no-fund --silent
	@touch $@

$(STAMP): pyproject.toml .ci/environment
	PYTHON="$(PYTHON)" .ci/environment $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) examples/node/node_modules .coverage* htmlcov .mypy_cache .ruff_cache .pytest_cache .hypothesis
