# One virtual environment, seven verbs. Nothing has to be installed by hand.
#
#   make demo      train, kill, start again, compare bit for bit
#   make demo-ddp  the same with two processes, one of which is killed
#   make test      the whole test suite
#   make check     ruff, mypy --strict, the architecture tests
#   make soak      damage files at random for FUZZ minutes (5), then search for a resumed run that differs, for
#                  MINUTES (60); SEED=n starts elsewhere
#   make bench     step overhead, import time, saving and loading beside their peers
#   make clean     remove the environment and caches; runs/ stays
#
# PYTHON=python3.12      which Python makes the environment (3.10 or newer)
# TORCH="torch==2.13.0"  what pip is asked for when the environment has no torch yet
# VENV=.venv             where the environment is
# ARGS="-k resume -x"    extra arguments for pytest (make test), the demo or the benchmark

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
ARGS   ?=
SEED   ?= 1000
MINUTES ?= 60
FUZZ   ?= 5

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.PHONY: help demo demo-ddp test check soak bench clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo 'make demo      train on real digits, kill -9 in mid-epoch, start again, compare bit for bit'
	@echo 'make demo-ddp  two processes, kill -9 of one, started again by torchrun, compared, and gone on with in one'
	@echo 'make test      run the whole test suite'
	@echo 'make check     ruff, mypy --strict on the package, the architecture tests'
	@echo 'make soak      damage files for FUZZ=5 minutes, look for resumed runs that differ for MINUTES=60; SEED=n'
	@echo 'make bench     steps, imports, saving and loading beside their peers: three quarters of an hour'
	@echo 'make clean     remove the environment and caches; runs/ stays'
	@echo
	@echo 'Each of them makes $(VENV) and installs what it needs first. Variables: PYTHON TORCH VENV ARGS SEED MINUTES FUZZ'

demo: $(VENV)/.installed-examples
	@$(BIN)/python examples/demo.py $(ARGS)

demo-ddp: $(VENV)/.installed-examples
	@$(BIN)/python examples/demo_ddp.py $(ARGS)

test: $(VENV)/.installed-test
	@$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-test $(VENV)/.installed-check
	@echo '== ruff'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo '== mypy --strict'
	@$(BIN)/mypy
	@echo '== architecture'
	@$(BIN)/python -m pytest -q --durations=0 tests/test_import_direction.py tests/test_public_names.py tests/test_readme.py

soak: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks.fuzz --minutes $(FUZZ) --seed $(SEED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.resume.search --minutes $(MINUTES) --seed $(SEED) $(ARGS)

bench: $(VENV)/.installed-bench
	@$(BIN)/python benchmarks/step_overhead.py $(ARGS)
	@$(BIN)/python benchmarks/import_time.py
	@$(BIN)/python benchmarks/saving.py
	@$(BIN)/python benchmarks/training_cost.py
	@$(BIN)/python benchmarks/training_cost.py --threads 2

clean:
	@echo '== removing $(VENV) and caches'
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	@find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment and torch. torch is installed first and alone, so that no other package chooses its build.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "holdfast needs Python 3.10 or newer; '$(PYTHON) --version' says: `$(PYTHON) --version 2>&1 | head -n 1`"; \
	  echo 'Name another one: make PYTHON=/path/to/python3.12'; exit 1; }
	@test -x $(BIN)/python || { \
	  echo '== making $(VENV) with '`$(PYTHON) --version`; $(PYTHON) -m venv $(VENV); } || { \
	  echo "Could not make $(VENV). On Debian and Ubuntu the module comes with: apt-get install python3-venv"; \
	  rm -rf $(VENV); exit 1; }
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  echo '== installing $(TORCH) (the big one: some minutes)'; $(PIP) install "$(TORCH)"; }
	@touch $@

# One stamp for each set of extras: the second call is instant, a changed pyproject.toml installs again.
$(VENV)/.installed-%: pyproject.toml $(VENV)/.torch
	@echo '== installing holdfast[$*] into $(VENV)'
	@$(PIP) install -e '.[$*]'
	@touch $@
