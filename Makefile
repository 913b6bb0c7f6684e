# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SLOW_STAMP := .venv/.installed-slow

.PHONY: demo test test-slow check clean

demo: $(STAMP)
	$(BIN)/expo demo

test: $(STAMP)
	$(BIN)/pytest -n 2 -m "not slow"

test-slow: $(SLOW_STAMP)
	$(BIN)/pytest -n 2 --dist loadgroup -m slow
	$(BIN)/pytest -n 2 --nbmake --nbmake-timeout=120 notebooks

check: $(SLOW_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# torch goes first: its pinned build is the CPU one, which the others then find installed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	touch $(STAMP)

# Ray is large: only slow tests use it, and the check of types looks at it.
$(SLOW_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	touch $(SLOW_STAMP)

clean:
	rm -rf .venv demo-output
