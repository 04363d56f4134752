# `make demo` and `make test` set themselves up: a Python and make are all they need, and a C++
# compiler for the native kernels, without which torch does their work.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
# Compiling all modules takes pip three quarters of its time; Python compiles those that are imported, when they are.
PIP := $(BIN)/python -m pip install --no-compile
TORCH := $(VENV)/.torch
READY := $(VENV)/.ready
TEST_READY := $(VENV)/.ready-for-tests
# Pyright collects its garbage a tenth of its time, unless it has room.
CHECK_TYPES := NODE_OPTIONS=--max-semi-space-size=128 $(BIN)/python -m pyright --pythonpath $(BIN)/python
TYPES_SAID := $(VENV)/.types
SAY_KERNELS = @$(BIN)/python -c "from executor import native; print('CPU kernels:', native.description())"
SOURCES := executor/native/CMakeLists.txt $(wildcard executor/native/src/*)

# pyright comes with its bundle and node from PyPI; without this it would ask for newer releases.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What the package is built with is pinned too; older releases of pip know the first one only.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
# Compiled modules are kept, also where the environment says otherwise: tests start many processes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo formats test test-all predictions fuzz lint rules format bench bench-peers notebooks clean distclean

help:  ## show this list
	@echo "make TARGET [PYTHON=python3.12] [JOBS=2]"
	@sed -n 's/^\([a-z-]*\):.*##/  \1\t/p' $(MAKEFILE_LIST)
	@echo "CPU build of torch: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"

demo: $(READY)  ## profile this machine, search a policy, run the demo model under it, compare
	$(BIN)/python -m executor.demo.run

formats: $(READY)  ## pack the demo model's weights, and its KV cache, into each format, and lay its perplexities side by side
	$(BIN)/python -m executor.demo.formats

# Types are checked beside the tests, on what these leave idle of the processor; what is said of them comes last.
test: rules  ## linters, import rules, then types and the tests (PYTEST_ARGS="-k name")
	@$(CHECK_TYPES) > $(TYPES_SAID) 2>&1 & types=$$!; trap 'kill $$types; exit 130' INT TERM; \
	  OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(PYTEST_ARGS); tests=$$?; \
	  wait $$types; types=$$?; echo "$(CHECK_TYPES)"; cat $(TYPES_SAID); exit $$((tests | types))

test-all: PYTEST_ARGS += --full
test-all: test  ## the same with every case of the products and random problems of which `test` runs a selection

predictions: $(TEST_READY)  ## which of the fixed predictions moved, and by how much (RECORD=1 agrees to them)
	$(BIN)/python -m tests.predictions

fuzz: $(TEST_READY)  ## changed files to every reader (FUZZ_EXAMPLES=200000, FUZZ_TARGETS=run,policy)
	JOBS=$(JOBS) $(BIN)/python -m tests.fuzz.run

lint: rules  ## ruff, import-linter and pyright
	$(CHECK_TYPES)

rules: $(TEST_READY)  ## ruff and import-linter
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/lint-imports --no-logo

format: $(TEST_READY)  ## apply the formatter and ruff's safe fixes
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

bench: $(TEST_READY)  ## everything in tests/bench that needs no GPU (BENCH_ARGS="-k name")
	$(BIN)/python -m pytest tests/bench -p no:xdist -m "not cuda" -o faulthandler_timeout=0 -s $(BENCH_ARGS)

bench-peers: $(TEST_READY)  ## ours and other engines on this CPU in turns (PEERS_ARGS="--peers vllm --repeats 1"; GBs of downloads)
	$(BIN)/python -m tests.bench.peers $(PEERS_ARGS)

notebooks: $(TEST_READY)  ## run the notebooks and write their outputs in place
	$(BIN)/python -m tests.tooling.notebooks

clean:  ## remove caches and builds
	rm -rf build dist .benchmarks .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find moe_hrm hrm executor tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the virtual environment too
	rm -rf $(VENV)

# torch goes first and alone: whichever build of it pip finds, it is exactly this version.
$(TORCH): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing); Python 3.11 or newer" \
	       "is needed: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  $(PYTHON) -m venv --clear $(VENV)
	$(PIP) torch==2.13.0
	@touch $@

$(READY): pyproject.toml $(SOURCES) $(TORCH)
	$(PIP) --editable .
	$(SAY_KERNELS)
	@touch $@

# Builds the kernels once if `make test` comes first: both are then ready.
$(TEST_READY): pyproject.toml $(SOURCES) $(TORCH)
	$(PIP) --editable '.[test]'
	$(SAY_KERNELS)
	@touch $(READY) $@
