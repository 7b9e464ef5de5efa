# Set-up and the everyday commands. Needs only Python >= 3.11 with its venv module, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint format clean help
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# The interpreter is checked first: an old one would fail much later, inside a dependency's build.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lpsearch needs Python >= 3.11; call make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --constraint constraints.txt --editable '.[test,lint]'
	@touch $@

demo: $(VENV)/.installed ## search SmolLM2-135M on this machine
	$(BIN)/python -m lpsearch.optimize --model smollm2-135m --budget 40

test: $(VENV)/.installed-dev ## run the tests
	$(BIN)/python -m pytest -m "not network"

lint: $(VENV)/.installed-dev ## check style, types and layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches; studies stay
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
