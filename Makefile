# `make demo` and `make test` create an environment in .venv the first time.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
INTEROP := .venv-interop
DOCS := .venv-docs
# one process per core, each with its own cache; those that have finished take over tests from the others
PARALLEL := -n logical --maxprocesses 8 --dist worksteal
MATHEMATICS := kernel targets stable process test_objective.py test_seeding.py test_views.py

.PHONY: demo check test test-all test-interop docs package lint format bench clean help

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "stablefield needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)."; \
	  echo "Install it, or choose another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' has no venv module (Debian and Ubuntu: apt-get install python3-venv)."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)   ## train on handwritten digits, sample, score and plot (about 2 minutes)
	$(BIN)/stablefield demo

check: $(READY) lint   ## check style and types, and run the quick tests of the mathematics (about a minute)
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow' $(addprefix tests/,$(MATHEMATICS))

test: $(READY) lint   ## check style and types, and run the quick tests
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow'

test-all: $(READY) lint   ## run the slow tests, too
	$(BIN)/python -m pytest $(PARALLEL)

$(INTEROP)/.ready: pyproject.toml constraints.txt constraints-interop.txt
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-interop.txt -e '.[dev,interop]'
	# torchcfm brings it through torchdyn; where it does not fit torch, diffusers cannot be imported
	$(INTEROP)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

test-interop: $(INTEROP)/.ready   ## run the loops of docs/loops with diffusers, Lightning, torchcfm and sbi
	$(INTEROP)/bin/python -m pytest tests/interop/test_*.py

$(DOCS)/.ready: requirements-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

docs: $(DOCS)/.ready   ## build the documentation as a website in site/, which needs no network to be read
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(DOCS)/bin:$$PATH" $(DOCS)/bin/mkdocs build --quiet
	@echo 'open site/index.html'

package: $(READY)   ## build the sdist and the wheel in dist/, and check them
	rm -rf dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,release]'
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

lint: $(READY)   ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)   ## format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)   ## run the benchmarks, and print times as ratios
	for script in $(filter-out %/common.py %/compare_checkouts.py, $(wildcard benchmarks/*.py)); do $(BIN)/python $$script || exit 1; done

clean:           ## remove the environment and the caches
	rm -rf .venv $(INTEROP) $(DOCS) site build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
