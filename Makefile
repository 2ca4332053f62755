# make run    sets up an environment and runs the quickstart
# make test   sets up an environment and passes the tests
# make check  what to do before every commit: the linter and the quick tests
# make docs   builds the documentation as a site in site/; a warning is an error
# All need Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV ?= .venv
# PyPI's Linux wheels of torch bring CUDA along, several gigabytes of it. Where the CPU index can be reached:
#   make run PIP_FLAGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
BIN := $(VENV)/bin
CODE := limbeck tests bench docs
LINT := $(BIN)/ruff format --check $(CODE) && $(BIN)/ruff check $(CODE)
# A process a core, each with one thread: tests of one file share what they set up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: run check test docs clean

run: $(VENV)/.installed
	$(BIN)/limbeck plan quickstart --auto
	$(BIN)/limbeck run quickstart --auto

# What to do before every commit: the formatter, the linter, and the tests that start no programs, browsers or whole runs.
check: $(VENV)/.installed-dev
	@begin=$$(date +%s) && $(LINT) && $(PYTEST) -m "not slow" && \
		echo "make check: $$(($$(date +%s) - begin)) s"

# The formatter, the linter and all tests. The studio is tested in a real browser: Debian's, where it can be installed; without one these tests say that they are skipped.
test: $(VENV)/.installed-dev
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] || \
		(apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium fonts-noto-cjk >/dev/null) || true
	@begin=$$(date +%s) && $(LINT) && $(PYTEST) && echo "make test: $$(($$(date +%s) - begin)) s, installation aside"

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "The documentation is at site/index.html (its search wants a server: python -m http.server --directory site)"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[dev,gym]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) runs site
