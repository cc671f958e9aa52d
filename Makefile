# supermix: `make demo` runs the main job, `make test` checks everything; both set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
FAST := core masks smoothing logs recipes notebooks contributing

.NOTPARALLEL:
.PHONY: help demo check test test-slow test-browser browser notebooks stale book export readme pictures data clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

demo: $(VENV)/.run data  ## the main job on real images: mixes, six students, a table (out/demo/)
	$(BIN)/supermix demo

check: $(VENV)/.dev  ## about a minute: notebooks and package agree, ruff (lint, format), the fast unit tests
	$(BIN)/python tools/house.py check
	$(BIN)/ruff check -q && $(BIN)/ruff format --check -q
	$(BIN)/python -m pytest -q $(FAST:%=tests/test_%.py) -n $(JOBS) --dist loadfile

test: $(VENV)/.dev data browser  ## check that notebooks and package agree, run all notebooks, then pytest
	$(BIN)/python tools/house.py check
	$(BIN)/ruff check -q && $(BIN)/ruff format --check -q
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(JOBS) --timing
	$(BIN)/python -m pytest tests -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 10

test-slow: $(VENV)/.dev data browser  ## the same with all slow tests; every saved output must be up to date
	$(BIN)/python tools/house.py check --strict
	$(BIN)/ruff check -q && $(BIN)/ruff format --check -q
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers $(JOBS) --timing --flags slow
	$(BIN)/python -m pytest tests --slow

test-browser: $(VENV)/.dev data browser  ## run every chapter in a real browser
	$(BIN)/python -m pytest tests/test_browser.py --slow -rs

notebooks: $(VENV)/.dev data  ## run every notebook from a clean kernel and save its outputs
	$(BIN)/python tools/house.py execute
	$(BIN)/python tools/house.py readme

stale: $(VENV)/.dev data  ## the same, only for notebooks whose code has changed since
	$(BIN)/python tools/house.py execute --stale
	$(BIN)/python tools/house.py readme

export: $(VENV)/.dev  ## write the package from the notebooks
	$(BIN)/nbdev_export

readme: $(VENV)/.dev  ## write the table of chapters into nbs/index.ipynb, and README.md from it
	$(BIN)/python tools/house.py readme

pictures: $(VENV)/.dev  ## draw the README's pictures, from results/ and from two photographs
	$(BIN)/python tools/pictures.py

book: $(VENV)/.dev  ## the whole course as a web site that needs no network (out/book/index.html)
	$(BIN)/python tools/book.py

data:  # install Fashion-MNIST from Debian if it is missing and we may; otherwise load_data downloads it
	@[ -d /usr/share/datasets/fashion-mnist ] || [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null \
	  || { echo "Fetching Fashion-MNIST (30 MB) from Debian"; \
	       { apt-get update -qq && apt-get install -qq -y dataset-fashion-mnist; } > /dev/null 2>&1 || echo "It is not available there"; }
	@$(BIN)/python -c "from supermix import load_data; print('Data:', load_data())"

browser:  # install Chromium from Debian if it is missing and we may; without it the browser's tests are skipped
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get > /dev/null \
	  || { echo "Fetching Chromium from Debian"; \
	       { apt-get update -qq && apt-get install -qq -y chromium; } > /dev/null 2>&1 || echo "It is not available there"; }

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV) 2> /dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y python3-venv \
	  && $(PYTHON) -m venv --clear $(VENV); } || { echo "Python's venv is missing: apt-get install python3-venv"; exit 1; }

$(VENV)/.run: $(VENV)/bin/python settings.ini setup.py
	@echo "Installing supermix and PyTorch into $(VENV) (a few minutes, once)"
	$(BIN)/python tools/install.py
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python settings.ini setup.py
	@echo "Installing supermix, PyTorch and the notebook tools into $(VENV) (a few minutes, once)"
	$(BIN)/python tools/install.py dev
	@touch $@ $(VENV)/.run

clean:  ## remove everything that these commands made
	rm -rf $(VENV) out build *.egg-info .pytest_cache .hypothesis _proc
