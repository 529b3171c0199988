# make demo    train BitNet b1.58 beside its dense twin on a CPU, in minutes
# make test    run the tests
# make lint    formatting, lint, types, import contract (what the commit hooks check)
# Each makes what it needs. PYTHON=python3.12 chooses the interpreter, PIP_EXTRA_INDEX_URL adds a package index.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint clean

demo: .venv/made
	$(BIN)/python train.py +experiment=demo

test: .venv/made
	$(BIN)/python -m pytest -n 2

lint: .venv/made
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

.venv/made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
