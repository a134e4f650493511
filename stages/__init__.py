"""Wrappers that DVC runs around the commands of gpt: they start the command and publish its results to MLflow."""

import sys
from importlib.util import find_spec

if not find_spec("mlflow"):  # dvc was started by its path, without the environment's bin folder on PATH
    sys.exit(f"stages: No module named 'mlflow' for {sys.executable}; activate the environment: . .venv/bin/activate")
