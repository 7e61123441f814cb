# Everything starts here. `make demo` and `make test` do all the set-up they need, the first time.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all lint format bench clean help

help:            ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "stablefield needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)."; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' has no venv module (Debian and Ubuntu: apt-get install python3-venv)."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)   ## train on the digits, sample, score, and plot the variance (about 2 minutes)
	$(BIN)/stablefield demo

test: $(READY) lint   ## style, types, and every test that is quick
	$(BIN)/python -m pytest -m 'not slow'

test-all: $(READY) lint   ## the slow tests too
	$(BIN)/python -m pytest

lint: $(READY)   ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)   ## let ruff arrange the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)   ## the timings of benchmarks/, as ratios
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:           ## remove the environment and the caches
	rm -rf .venv build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
