# Set-up and the everyday commands. Needs only Python >= 3.11 with its venv module, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Compiling all of torch and transformers takes a minute; Python compiles what is used when it is first imported. Before tests,
# for which a warning of a compiler is an error, everything is compiled, by all cores; what no Python 3 compiles is left.
INSTALL := $(PIP) install --no-compile --constraint constraints.txt --editable

# vLLM pins torch and an older transformers, so it is installed in a separate environment. Exported directories go there too.
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_PIP := $(VLLM_BIN)/python -m pip --disable-pip-version-check --quiet

# Number of processes that run tests; each needs about 3 GB.
TEST_PROCESSES ?= 2

.PHONY: demo docs test test-engines test-llamacpp test-vllm lint audit format clean help
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# Check the interpreter first: an old one would fail much later, inside a dependency's build.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "lpsearch needs Python >= 3.11; call make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) '.[test,lint]'
	-@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) '.[docs]'
	@touch $@

demo: $(VENV)/.installed ## search SmolLM2-135M-Instruct (4-bit) on this machine
	$(BIN)/python -m lpsearch.optimize --model smollm2-135m --budget 40

test: $(VENV)/.installed-dev ## run the tests
	$(BIN)/python -m pytest -m "not network" --numprocesses $(TEST_PROCESSES) --dist loadfile

test-engines: test-llamacpp test-vllm ## run exported plans in llama.cpp and in vLLM

test-llamacpp: $(VENV)/.installed-dev ## run exported GGUF files in stock llama.cpp
	$(BIN)/python -m pytest -m "not network" tests/llamacpp

# The three removed packages decode pictures and sound, and are built for another torch than the pinned one.
$(VLLM_VENV)/.installed: pyproject.toml tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --requirement tests/vllm/requirements.txt
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --no-deps --editable .
	@touch $@

test-vllm: $(VENV)/.installed-dev $(VLLM_VENV)/.installed ## export models and serve them by vLLM, on the CPU
	$(BIN)/python -m tests.vllm.prepare $(VLLM_VENV)/exports
	LPSEARCH_VLLM_EXPORTS=$(abspath $(VLLM_VENV)/exports) VLLM_CACHE_ROOT=$(abspath $(VLLM_VENV)/cache) \
		OMP_NUM_THREADS=$$(nproc) $(VLLM_BIN)/python -m pytest -o addopts= -o filterwarnings=default -ra --durations=15 tests/vllm

lint: $(VENV)/.installed-dev ## check style, types, layering and the pinned dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/audit.py

audit: $(VENV)/.installed-dev ## check the pinned dependencies against known vulnerabilities, without a network
	$(BIN)/python .ci/audit.py

# The variable silences an advertisement of mkdocs-material, which is not a warning of the build.
docs: $(VENV)/.installed-docs ## build the documentation into site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(VENV)/.installed-dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches; studies stay
	rm -rf $(VENV) $(VLLM_VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis
