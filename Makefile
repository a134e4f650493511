# `make help` lists the targets. Each consists of a few commands that can also be typed by hand.
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export SHELL  # DVC runs its commands in it; the login shell of a service account may refuse
unexport PYTHONSAFEPATH  # would hide the code in this folder
INSTALL = python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable

.DEFAULT_GOAL := help
.PHONY: help repro test proof chaos bench ui serve clean lock plots

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

repro: $(VENV)/checked ## Install, check params.yaml, repair DVC's files after a crash, run the pipeline, sync MLflow
	python -m stages.repair
	dvc repro
	-python -m stages.sync

test: $(VENV)/test ## Install the test dependencies and run the tests (4 to 6 minutes)
	python -m pytest -n 2 --dist loadfile -m "not proof"

proof: $(VENV)/test ## Run the slow tests; they need root and Debian's packages chromium and postgresql
	python -m pytest -m proof
	CHARGPT_FUZZ_CASES=3400 python -m pytest tests/commands/test_fuzz.py

chaos: $(VENV)/test ## Kill the pipeline 200 times at random moments and compare its outputs (one to two hours)
	python -m tests.chaos --kills 200

bench: $(VENV)/pipeline ## Compare with nanoGPT, profile training, measure growth, decoding, serving, tokenizing, start-up (35 minutes)
	python -m benchmarks.races
	OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m benchmarks.steps
	OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=1 -m benchmarks.sharding
	OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 -m benchmarks.sharding
	python -m benchmarks.scale
	python -m benchmarks.decoder
	python -m benchmarks.serving
	python -m benchmarks.startup
	python -m benchmarks.tokenizing

ui: $(VENV)/pipeline ## Show the runs in MLflow's UI on http://127.0.0.1:5000; another port: make ui PORT=5001
	python -m stages.ui $(PORT)

serve: $(VENV)/pipeline ## Serve the champion, and its successors, on http://127.0.0.1:8000; another port: make serve PORT=8001
	python -m stages.serve --watch 10 $(if $(PORT),--port $(PORT))

clean: ## Delete the environment, outputs and tool caches; keep MLflow runs, DVC experiments and DVC's cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info data/tokens
	rm -f data/shakespeare.txt chargpt_nano.pt generation_out.txt gpt_nano.log
	find gpt stages benchmarks tests -name __pycache__ -exec rm -rf {} +

plots: $(VENV)/pipeline ## Create the plots of README and docs from the outputs of the pipeline
	python -m docs.plots

lock: $(VENV)/test ## Write the installed versions to requirements.lock
	{ echo '# Versions that every `make` target installs, as constraints. Written by: make lock'; \
		python -m pip freeze --exclude-editable | sed -E 's/[+].*//'; } > requirements.lock

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON): expected Python 3.11 or newer, found $$($(PYTHON) -V); choose another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/pipeline: $(VENV)/bin/python pyproject.toml requirements.lock
	$(INSTALL) '.[pipeline,serve]'
	@touch $@

$(VENV)/test: $(VENV)/pipeline
	$(INSTALL) '.[pipeline,serve,test]'
	@touch $@

$(VENV)/checked: $(VENV)/pipeline params.yaml $(shell find gpt -name '*.py')
	python -m gpt check-params params.yaml
	@touch $@
