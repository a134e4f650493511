# The whole project in a few words: `make repro`, `make ui`, `make test`. Each target is two or three plain commands.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
INSTALL = python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable

.DEFAULT_GOAL := help
.PHONY: help repro test proof chaos bench ui clean lock plots

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

repro: $(VENV)/checked ## Install, check params.yaml, run the pipeline: from nothing to a trained, measured, tracked model
	python -m stages.mend
	dvc repro
	-python -m stages.sync

test: $(VENV)/test ## Install with the test extras and run the tests
	python -m pytest -m "not proof"

proof: $(VENV)/test ## Run the tests that take longer; they need the browser chromium
	python -m pytest -m proof

chaos: $(VENV)/test ## Kill the pipeline 200 times at random and compare what it leaves (half an hour and more)
	python -m tests.chaos --kills 200

bench: $(VENV)/pipeline ## Race our recipes against nanoGPT's, take steps apart, and price equal bits (20 minutes)
	python -m benchmarks.races
	OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m benchmarks.steps
	OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=1 -m benchmarks.sharding
	OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m benchmarks.sharding

ui: $(VENV)/pipeline ## Compare the models in MLflow's UI on http://127.0.0.1:5000
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow ui --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db} \
		--host 127.0.0.1 --port 5000 --allowed-hosts localhost:5000,127.0.0.1:5000

clean: ## Delete what can be made again: environment, outputs, caches; runs and experiments stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info data/tokens
	rm -f data/shakespeare.txt chargpt_nano.pt generation_out.txt gpt_nano.log
	find gpt stages benchmarks tests -name __pycache__ -exec rm -rf {} +

plots: $(VENV)/pipeline ## Create the plots of README and docs from the outputs of the pipeline
	python -m docs.plots

lock: $(VENV)/test ## Write the exact versions of this environment into requirements.lock
	{ echo '# Exact public versions that every `make` target installs, as constraints. Written by: make lock'; \
		python -m pip freeze --exclude-editable | sed -E 's/[+].*//'; } > requirements.lock

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON): expected Python 3.11 or newer, found $$($(PYTHON) -V); name another one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/pipeline: $(VENV)/bin/python pyproject.toml requirements.lock stages/mend.py
	$(INSTALL) '.[pipeline]'
	python -m stages.mend install
	@touch $@

$(VENV)/test: $(VENV)/pipeline
	$(INSTALL) '.[pipeline,test]'
	@touch $@

$(VENV)/checked: $(VENV)/pipeline params.yaml $(wildcard gpt/*.py)
	python -m gpt check-params params.yaml
	@touch $@
