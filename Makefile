# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu test-matrix torture check lint format types docs bench results bench-growth \
	clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/user: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ .venv/user

demo: .venv/user ## run a small example on embedded data: experts, two distillations, evaluation (under 3 minutes)
	$(BIN)/condense demo

test: .venv/dev ## run the tests (about 12 minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

test-slow: .venv/dev ## run the slow tests, which take longer than all others together
	$(BIN)/python -m pytest -m slow -q

test-gpu: .venv/dev ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu -q

.venv-oldest/dev: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --editable '.[dev]' 'torch==2.6.*' 'torchvision==0.21.*'
	@touch $@

test-matrix: .venv/dev .venv-oldest/dev ## run the tests with other instruction sets, numbers of threads and the oldest torch (about an hour)
	$(BIN)/python -m tests.matrix

torture: .venv/dev ## test reliability: killed processes, full disks, damaged files, concurrent commands (over an hour; resumes)
	mkdir -p build
	$(BIN)/python -m tests.torture --state build/torture.json

check: lint types test ## lint, types and test: must pass before a change is merged

lint: .venv/dev ## check rules and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev ## let ruff fix rules and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/dev ## type-check the built wheel, which is what a user installs
	rm -rf build/types/site build/types/source && mkdir -p build/types/source
	cp -r condense methods buffers eval pyproject.toml README.md LICENSE build/types/source
	$(BIN)/python -m pip install --quiet --no-deps --target build/types/site build/types/source
	MYPYPATH=build/types/site $(BIN)/mypy -p condense --linecount-report build/types/report --cache-dir build/types/cache
	$(BIN)/python tests/types_seen.py build/types/report/linecount.txt

.venv/docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@ .venv/user

docs: .venv/docs ## build the documentation site in build/site; a link that leads nowhere is an error
	$(BIN)/python -m mkdocs build

bench: .venv/user ## compare the engine with a textbook implementation (about half an hour on two cores)
	$(BIN)/python -m benchmarks

DEVICE ?= cpu
results: .venv/user ## measure the open rows of results/table.yaml with the files in DATA, and make docs/results.md (LIMIT minutes)
	$(BIN)/python -m benchmarks.results $(if $(DATA),--data $(DATA)) $(if $(LIMIT),--limit $(LIMIT)) --device $(DEVICE)

bench-growth: .venv/dev ## measure how time and memory grow with images, classes, steps and experts (under 10 minutes)
	$(BIN)/python -m benchmarks.growth

clean: ## remove .venv, built files and caches
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
