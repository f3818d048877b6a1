# Two targets do everything on a fresh machine with Python 3.11 and make: quickstart and test.
VENV := .venv
PYTHON ?= python3.11
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.NOTPARALLEL:
.PHONY: quickstart test test-all test-faults lint format bench docs audit sbom clean
.DEFAULT_GOAL := quickstart

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: WHAT = .
$(VENV)/.installed-dev: WHAT = '.[dev]'
$(VENV)/.installed-docs: WHAT = '.[docs]'
$(VENV)/.installed $(VENV)/.installed-dev $(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e $(WHAT)
	touch $(VENV)/.installed $@

quickstart: $(VENV)/.installed
	$(BIN)/catid2 reindex --recipe jobs/recipes/quickstart.yaml

# What a change must pass, in minutes. Two processes; those that start Ray come second, the longest file first.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
test: $(VENV)/.installed-dev
	$(TESTS) -m "not cluster and not slow"
	$(TESTS) -m "cluster and not slow" --no-loadscope-reorder

# Everything. Besides `test`: three jobs stopped by signals (jobs/test_stopped.py), replicas that are killed
# and scaled under load (end_to_end/test_replicas_under_load.py), the compiled beam.
test-all: $(VENV)/.installed-dev
	$(TESTS) -m "not cluster"
	$(TESTS) -m cluster --no-loadscope-reorder

# Kills, disks and networks that fail, the slow ones included: a table of what each cost, on the screen and in benchmarks/results/.
test-faults: $(VENV)/.installed-dev
	$(TESTS) -m faults --faults-page benchmarks/results/faults.md

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	for file in benchmarks/*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$file || exit 1; done

# The manual, into site/. A dead link or a page that the menu does not name fails.
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

# Tools of their own, so that they are no part of what they look at.
$(VENV)/audit/bin/pip-audit: | $(BIN)/python
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install -q pip-audit==2.10.1 cyclonedx-bom==7.5.0

# Known holes in the versions that the tests run on. Asks PyPI; a package that it cannot ask about fails too (--strict).
audit: $(VENV)/audit/bin/pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

# What is installed, as CycloneDX, into sbom.json. Needs no network once its tool is there.
sbom: $(VENV)/.installed $(VENV)/audit/bin/pip-audit
	$(VENV)/audit/bin/cyclonedx-py environment $(VENV) --of JSON -o sbom.json

clean:
	rm -rf $(VENV) catid2_store site sbom.json
