# make quickstart   set up, then train and evaluate a small model on the CPU
# make test         set up, then lint and test
# make install      set up only: .venv with the pinned dependencies and this package
# PYTHON=python3.12 before any of these chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: install quickstart test lint

install: $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/python -m cfpp.main --config=configs/quickstart.py --workdir=runs/quickstart

test: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Reinstalls when the list of dependencies changes, and after an interrupted installation.
$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) must be Python 3.11 or newer; try PYTHON=python3.11 make ..."; exit 2; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing the dependencies into $(VENV): a few minutes the first time."
	$(BIN)/pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[atari,tensorboard,test]'
	@touch $@
