"""The LoggedModel of a run: MLflow loads it without this project, and it generates what `gpt generate` prints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt.core.files import sha256_file
from stages import sync
from stages.runs.run_record import Record, save
from tests.conftest import RunMain

LOAD = """
import json, sys, mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
prompts, params = json.loads(sys.argv[2])
import gpt  # the loader has put the model's code first
print(json.dumps([gpt.__file__, model.predict(prompts, params=params)]))
"""
PROMPTS, SAMPLING = ["the ", "a "], {"max_new_tokens": 20, "temperature": 0.9, "top_k": 7, "seed": 3, "stop": ["\n"]}


def test_mlflow_loads_the_model_in_an_empty_folder(
    trained: Path, tmp_path: Path, empty_store: Path, run_main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code is in the model: another folder has no package `gpt`."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    checkpoint = trained / "model.pt"
    about: dict[str, Any] = {"checkpoint": sha256_file(checkpoint), "checkpoint_file": str(checkpoint)}
    save(tmp_path / ".runs" / ("0" * 64), Record(stage="train", began=1, ended=2, **about), {})
    assert sync.main([]) == 0
    run_id = next(path.name for path in (tmp_path / "mlruns").iterdir() if path.name != "models")
    (tmp_path / "empty").mkdir()
    address = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    arguments = [f"runs:/{run_id}/chargpt", json.dumps([PROMPTS, SAMPLING])]
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments],
        cwd=tmp_path / "empty",
        env={**os.environ, **address},
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    package, texts = json.loads(loaded.stdout.splitlines()[-1])
    assert "chargpt/code/gpt" in package
    options = ["--max-new-tokens", "20", "--temperature", "0.9", "--top-k", "7", "--seed", "3", "--stop", "\n"]
    for prompt, text in zip(PROMPTS, texts, strict=True):
        printed = run_main("generate", "--checkpoint", trained / "model.pt", "--prompt", prompt, *options)
        assert printed == f"{text}\n"
