# The commands of this project. Each works on a bare machine: the environment is made when it is missing.
#   make up      a leader, two followers and a proxy; Ctrl-C stops them       (ARGS="app.db --followers 3")
#   make test    lint, types, and the tests with coverage                     (ARGS="tests/formats -k wal" WORKERS=0)
#   make lint    ruff and mypy only
#   make bench   the ratios of docs/performance.md, measured on this machine  (ARGS="--quick writes")
#   make simulate  200,000 seeds of the failover simulation, an hour and more  (ARGS="1234 --verbose" replays one)
#   make soak    the minutes-long proofs on real processes
#   make chaos   kills, pauses, cuts under load, with figures (docs/chaos.md)  (ARGS="kill-leader --runs 100")
#   make clients-table   the table of docs/clients.md, from a run of every client
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
WORKERS ?= 2

.PHONY: help up test lint bench simulate soak chaos clients clients-table clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#   //p' Makefile

up: $(STAMP)
	$(BIN)/walship up $(ARGS)

# Most tests wait for processes, so two at a time take half as long. A file stays in one worker: its tests share clusters.
test: lint clients
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term:skip-covered $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m bench $(ARGS)

simulate: $(STAMP)
	$(BIN)/python -m tests.simulation $(or $(ARGS),0 --count 200000)

soak: $(STAMP) clients
	$(BIN)/python -m pytest -m soak -s --timeout=3600 -o faulthandler_timeout=3500 $(ARGS)

chaos: $(STAMP)
	$(BIN)/python -m tests.chaos --json chaos-report --keep chaos-report/kept $(or $(ARGS),all)

# The npm clients that the tests and examples talk through; without node those tests say that they are skipped.
NPM := examples/node/node_modules/.installed tests/clients/js/node_modules/.installed
clients: $(STAMP)
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(NPM); \
	 else echo "npm is not here: tests with the JavaScript client will be skipped"; fi

# Install steps of packages would fetch binaries; the ones used here come with theirs.
$(NPM): %/node_modules/.installed: %/package.json
	cd $* && npm install --no-audit --no-fund --silent --ignore-scripts --no-package-lock
	@touch $@

clients-table: clients
	$(BIN)/python -m tests.clients.matrix

$(STAMP): pyproject.toml .ci/environment
	PYTHON="$(PYTHON)" .ci/environment $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) examples/node/node_modules tests/clients/js/node_modules .coverage* htmlcov .mypy_cache .ruff_cache .pytest_cache .hypothesis
