# make quickstart   set up, then train and evaluate a small model on the CPU
# make test         set up, then lint and test
# make test-all     the same, and the tests that take minutes each
# make install      set up only: .venv with the pinned dependencies and this package
# PYTHON=python3.12 before any of these chooses the interpreter (3.11 or newer).
#
# Only the tests need PyTorch. On Linux, PyPI's brings CUDA, several GB; the small one for CPUs comes
# by PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test, where that can be reached.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
TESTABLE := $(VENV)/testable
LIBTPU := $(VENV)/libtpu

.PHONY: install quickstart test test-all lint

install: $(INSTALLED)

# A step takes hundreds of MB of fresh memory: in pages of 2 MB, where Linux has them, it is faster.
# LLVM's dearer passes cost more time in compiling than its programs here gain.
quickstart: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
quickstart: export XLA_FLAGS ?= --xla_backend_optimization_level=1
quickstart: $(INSTALLED)
	$(BIN)/python -m cfpp.main --config=configs/quickstart.py --workdir=runs/quickstart

test: lint $(LIBTPU)/installed
	$(PYTEST) -m "not slow"

test-all: lint $(LIBTPU)/installed
	$(PYTEST)

lint: $(TESTABLE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST = PYTHONPATH=$(CURDIR)/$(LIBTPU) JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n auto --durations=10

# The TPU's compiler works without a TPU. It has a place of its own, for tests: where JAX finds it,
# every program looks for TPUs first and complains that there are none. Other machines than Linux on
# x86-64 have none, and leave those tests out.
$(LIBTPU)/installed: $(INSTALLED)
	@mkdir -p $(LIBTPU)
	$(PIP_INSTALL) --no-deps --upgrade --target $(LIBTPU) \
	  'libtpu; platform_system == "Linux" and platform_machine == "x86_64"'
	@touch $@

$(TESTABLE): $(INSTALLED)
	@echo "Installing what the tests need into $(VENV)."
	$(PIP_INSTALL) --editable '.[atari,tensorboard,test]'
	@touch $@

# Reinstalls when the list of dependencies changes, and after an interrupted installation.
$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) must be Python 3.11 or newer; try PYTHON=python3.11 make ..."; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the dependencies into $(VENV): a few minutes the first time."
	$(PIP_INSTALL) --editable '.[atari,tensorboard]'
	@touch $@
