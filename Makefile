# make run    sets up an environment and runs the quickstart
# make test   sets up an environment and passes the tests
# Both need Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV ?= .venv
# PyPI's Linux wheels of torch bring CUDA along, several gigabytes of it. Where the CPU index can be reached:
#   make run PIP_FLAGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple"
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
BIN := $(VENV)/bin

.PHONY: run test lint clean

run: $(VENV)/.installed
	$(BIN)/limbeck plan recipes/quickstart.yaml --auto
	$(BIN)/limbeck run recipes/quickstart.yaml --auto

# The studio is tested in a real browser: Debian's, where it can be installed; without one these tests say that they are skipped.
test: $(VENV)/.installed-dev
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] || \
		(apt-get -qq update && apt-get -qq install --yes --no-install-recommends chromium fonts-noto-cjk >/dev/null) || true
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check limbeck tests bench

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[dev,gym]"
	touch $@

clean:
	rm -rf $(VENV) runs
