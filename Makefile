# Every target starts from a fresh clone: the first one makes .venv and installs into it.
# PYTHON chooses the interpreter, PIP_ARGS is handed to every `pip install`.

PYTHON ?= python3
PIP_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)
INSTALLED := .venv/.installed

.PHONY: help parity test lint suites mutation oracles browser clean
.DELETE_ON_ERROR:

help:
	@echo "make parity   judge the default suite, write reports/latest"
	@echo "make test     run the tests"
	@echo "make lint     ruff, its formatter, mypy"
	@echo "make suites   run the suites of cases and the planted faults"
	@echo "make mutation judge small wrong programs made of fold_impl, write reports/mutation.md"
	@echo "make oracles  add an oracle of the rank tables whose requirements no extra of ours has"
	@echo "make browser  install Chromium, its driver and selenium, and test report.html in it"
	@echo "make clean    remove .venv, caches and run directories"

# torch comes first and by exact version: left to the resolver it may be another build
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

parity: $(INSTALLED)
	$(BIN)/parity run

test: $(INSTALLED)
	$(BIN)/pytest -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

suites: $(INSTALLED)
	$(BIN)/parity run --suite seed
	$(BIN)/pytest -n auto --parity-suite default cases
	for suite in models deepspeed-engine checkpoints; do \
	  $(BIN)/parity run --suite $$suite || exit; done
	for suite in deepspeed megatron; do \
	  $(BIN)/parity run --suite $$suite --fail-on new || exit; done
	$(BIN)/parity faults run --out reports/faults
	FAULT_DRAWS=50 $(BIN)/pytest -n auto tests/parity/test_faults.py

mutation: $(INSTALLED)
	$(BIN)/python -m tests.mutation --out reports/mutation.md

# torchtitan requires datasets, wandb, tensorboard ...; its rank tables need three small packages
oracles: $(INSTALLED)
	$(PIP) --no-deps torchtitan==0.3.0 spmd_types==0.2.3 tyro==1.0.17 docstring_parser==0.18.0

# packages of Debian and Ubuntu; on another system have chromium and chromedriver on the PATH
browser: $(INSTALLED)
	$(PIP) --constraint constraints.txt --editable '.[browser]'
	command -v chromium chromedriver >/dev/null || { \
	  sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
	  $$sudo apt-get update && $$sudo apt-get install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core; }
	PARITY_NEEDS_BROWSER=1 $(BIN)/pytest tests/browser

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find reports -mindepth 1 -maxdepth 1 -not -name baselines -not -name examples -not -name "*.md" -exec rm -rf {} + 2>/dev/null || true
