# Two commands on a fresh machine: `make evaluate`, `make test`. Everything lives in .venv.
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
BENCHMARK ?= digits
STUDY ?= baseline
ROOT ?=
OPTIONS ?=
PREFECT_PORT ?= 4200
MLFLOW_PORT ?= 5000

export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK := 1
# uv reads no pip configuration; a pip one only confuses what follows.
unexport PIP_FIND_LINKS PIP_CONSTRAINT

.PHONY: setup evaluate study plots test lint serve measure docs clean
.ONESHELL:
.SHELLFLAGS := -euc

setup: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml constraints.txt
	@if command -v uv >/dev/null; then uv=uv; else
	  [ -x $(BIN)/pip ] || $(PYTHON) -m venv .venv
	  $(BIN)/pip install -q --disable-pip-version-check uv
	  uv=$(BIN)/uv
	fi
	[ -x $(BIN)/python ] || $$uv venv -q --python "$(PYTHON)" .venv
	echo "installing into .venv (about 2 GB to download the first time)"
	$$uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e ".[pipeline,models,serve,ray,docs,dev]"
	touch $@

evaluate: setup
	@$(BIN)/python -m flows.evaluate --benchmark $(BENCHMARK) $(if $(ROOT),--root '$(ROOT)') $(OPTIONS)

# An experiment of data/studies/, and its page in docs/studies/.
study: setup
	@$(BIN)/python -m flows.study --study $(STUDY) $(if $(filter-out file,$(origin BENCHMARK)),--benchmark $(BENCHMARK)) $(if $(ROOT),--root '$(ROOT)') $(OPTIONS)

# ROC curves and scores of the recorded run as a page that needs no network.
plots: setup
	@$(BIN)/python -m tasks.plots

lint: setup
	@ruff check .
	ruff format --check .
	mypy
	lint-imports

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# The scoring engine against the published schedule of network calls and plain batching.
measure: setup
	@python experiments/engine.py --output experiments/results/engine.json $(OPTIONS)

# The pages of docs/ and the library's reference as a site, site/index.html; a warning is an error.
docs: setup
	@NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict
	echo "site/index.html"

# Prefect server, work pool, deployments, worker and the MLflow UI, on loopback, until Ctrl-C.
serve: setup
	@exec python -m flows.serve --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)

clean:
	@rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
