# `make demo` and `make test` do all set-up themselves, in .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
OLDEST := .venv-oldest
NEWEST := .venv-newest
# All tests of a file run in one process, which makes their fixtures once.
IN_TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-oldest test-newest test-newest-quick lint clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/pytest $(IN_TWO)

test-slow: $(INSTALLED)
	$(BIN)/pytest $(IN_TWO) -m slow

# The oldest transformers that pyproject.toml allows, and the hub client that it needs; all else as
# in constraints-dev.txt.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest $(IN_TWO)

# The newest releases of everything, as a user gets them; `make clean` forgets those installed here.
test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/pytest $(IN_TWO)

# Every architecture: streamed, narrowed, saved, loaded, with layers that differ in width.
test-newest-quick: $(NEWEST)/.installed
	$(NEWEST)/bin/pytest -n 2 tests/test_architectures.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check \
		--constraint constraints-dev.txt --editable ".[dev]"
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(OLDEST)
	sed -e 's/^transformers==.*/transformers==5.17.*/' -e 's/^huggingface_hub==.*/huggingface_hub<2/' \
		constraints-dev.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check \
		--constraint $(OLDEST)/constraints.txt --editable ".[dev]"
	touch $@

$(NEWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv $(OLDEST) $(NEWEST) build
