# `make demo` shows the job at work, `make test` checks everything; both make their own virtual environment in .venv.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(if $(shell $(name) -c $(USABLE) 2>/dev/null && echo yes),$(name))))
USABLE := 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
BENCH_PYTHON ?= $(BIN)/python
# A GPU machine need not have the environment of this folder: make bench-gpu BENCH_PYTHON=python3.

.PHONY: help demo test test-newest test-browser chromium fish test-deploy test-spark chaos scale bench bench-gpu lint format audit clean
.DELETE_ON_ERROR:

help:  ## List the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/demo.stamp  ## Embed the docstrings of Python's standard library and search them in plain English
	$(BIN)/python jobs/demo_corpus.py demo/corpus
	$(BIN)/python jobs/embed_corpus.py --input demo/corpus --output demo/vectors --id-column id --keep-columns module text
	$(BIN)/python jobs/demo_search.py demo/vectors

test: lint  ## Lint, type check and run the tests, two files at a time
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-newest:  ## Run the tests with the newest releases that pyproject.toml allows, in .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	.venv-newest/bin/python -m pytest --numprocesses 2 --dist loadfile

test-browser: .venv/dev.stamp chromium  ## Look at a report in Chromium; as root, install Debian's where there is none
	$(BIN)/python -m pytest tests/run/test_report_browser.py

chromium: FONTS := fonts-dejavu-core
chromium fish:
	@command -v $@ >/dev/null || { apt-get update --quiet --quiet && \
		apt-get install --quiet --quiet --yes --no-install-recommends $@ $(FONTS) >/dev/null; }

test-deploy: .venv/dev.stamp .venv-deploy/stamp  ## Try the Airflow and Dagster examples on the real libraries
	NODE_PYTHON=$(abspath $(BIN)/python) PYTHONPATH=. .venv-deploy/bin/python -m pytest -c /dev/null --rootdir . --import-mode importlib \
		-p no:cacheprovider --noconftest tests/deploy/orchestrators.py

test-spark: .venv/dev.stamp .venv/spark.stamp  ## Run the recipe for Spark too: needs Java 17 and downloads 0.5 GB
	@command -v java >/dev/null || { echo "Spark needs Java 17 or later, such as the package openjdk-17-jre-headless"; exit 1; }
	$(BIN)/python -m pytest tests/test_recipes.py -k spark

chaos: .venv/dev.stamp  ## Raise six storms of kills over the job and compare what they leave, about half an hour
	$(BIN)/python -m tests.chaos.storms --out benchmarks/results/chaos-$$(date -u +%F).json
	$(BIN)/python -m tests.chaos.storms --small-files --units 240 --seeds 5 6 --out benchmarks/results/chaos-small-files-$$(date -u +%F).json

lint: .venv/dev.stamp  ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/dev.stamp  ## Rewrite the sources in the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

scale: .venv/dev.stamp  ## Measure how far one driver reaches, with a million units, on a disk and on S3, about 40 minutes
	$(BIN)/python -m benchmarks.scale --out benchmarks/results/scale-disk-$$(date -u +%F).json
	$(BIN)/python -m benchmarks.scale --s3 --stages plan --out benchmarks/results/scale-s3-$$(date -u +%F).json

bench: .venv/dev.stamp  ## Measure every stage and the peers on this CPU, a few minutes
	$(BIN)/python -m benchmarks.bench --out benchmarks/results/cpu-minilm-$$(date -u +%F).json

bench-gpu:  ## The same on the GPU of this machine
	$(BENCH_PYTHON) -m benchmarks.bench --device cuda --model bert-base --out benchmarks/results/cuda-bert-base-$$(date -u +%F).json
	$(BENCH_PYTHON) -m benchmarks.bench --device cuda --model minilm --out benchmarks/results/cuda-minilm-$$(date -u +%F).json

audit:  ## Look up the pinned dependencies in the database of known vulnerabilities (asks PyPI's service)
	$(or $(PYTHON),python3) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet pip-audit
	.venv/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

clean:  ## Remove the environment, the demo and every cache
	rm -rf .venv .venv-deploy .venv-newest demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/%.stamp: pyproject.toml constraints.txt
	@echo "Installing embed-corpus[$*] into .venv, a few minutes the first time ..."
	$(or $(PYTHON),$(error No Python of 3.11 to 3.13 with venv was found; install one or run make PYTHON=/path/to/python)) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

.venv-deploy/stamp: pyproject.toml
	@echo "Installing Airflow and Dagster into .venv-deploy, a few minutes the first time ..."
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/python -m pip install --quiet 'apache-airflow>=3.3,<4' 'dagster>=1.13,<2' 'ray[default]==2.60.0' cyclopts tenacity pytest psutil
	.venv-deploy/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@
