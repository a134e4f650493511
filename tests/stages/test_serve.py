"""`python -m stages.serve`: models of the registry, and a new champion while the server runs."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt.api import load
from gpt.core.errors import UserError
from gpt.core.files import sha256_file
from stages import serve
from stages.runs.publish import connect, publish_run
from stages.runs.run_record import Record, save
from stages.tracking.registered_source import RegisteredSource
from stages.tracking.registry import CHAMPION, REGISTERED, Registry
from stages.tracking.store import Store
from tests.support.common import wait_for
from tests.support.serving import serving

ADDRESS = f"models:/{REGISTERED}@{CHAMPION}"


@pytest.fixture
def store(trained: Path, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with two models as versions 1 and 2, of which the first one is the champion."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")  # as the registry sets it
    store = connect(tmp_path, "chargpt")
    first = load(trained / "model.pt").checkpoint
    second = replace(first, weights={name: 1.01 * weight for name, weight in first.weights.items()})
    for number, checkpoint in enumerate((first, second), start=1):
        path = tmp_path / f"{number}.pt"
        checkpoint.save(path)
        about: dict[str, Any] = {"checkpoint": (digest := sha256_file(path)), "checkpoint_file": str(path)}
        tags = {"run.key": digest, "checkpoint.sha256": digest}
        save(tmp_path / ".runs" / digest, Record(stage="train", began=number, ended=9, tags=tags, **about), {})
        publish_run(store, tmp_path / ".runs" / digest)
        registry = Registry(store)
        registry.register(registry.find({"checkpoint.sha256": digest}, "missing"))
    store.client.set_registered_model_alias(REGISTERED, CHAMPION, "1")
    return store


def test_a_new_champion_is_served_as_soon_as_it_is_one(store: Store, tmp_path: Path) -> None:
    sources = [RegisteredSource(store, each, tmp_path / "downloads") for each in (ADDRESS, f"models:/{REGISTERED}/1")]
    digests = [sha256_file(tmp_path / f"{number}.pt") for number in (1, 2)]
    with serving(*sources, watch_s=0.1) as server:

        def served() -> dict[str, str]:
            return {each["id"]: each["sha256"] for each in server.get("/v1/models").json()["data"]}

        assert served() == {"chargpt@champion": digests[0], "chargpt/1": digests[0]}
        store.client.set_registered_model_alias(REGISTERED, CHAMPION, "2")
        wait_for(lambda: served()["chargpt@champion"] == digests[1])
        assert served()["chargpt/1"] == digests[0]
        store.client.delete_registered_model_alias(REGISTERED, CHAMPION)
        text = server.complete(prompt="the ", max_tokens=20, seed=1)["text"]
        assert "the " + text == load(tmp_path / "2.pt").generate("the ", max_new_tokens=20, seed=1)


def test_a_changed_checkpoint_in_the_store_is_refused(store: Store, tmp_path: Path) -> None:
    for path in (tmp_path / "mlruns" / "models").rglob("*.pt"):
        shutil.copyfile(tmp_path / "2.pt", path)
    with pytest.raises(UserError, match="SHA-256"):
        RegisteredSource(store, ADDRESS, tmp_path / "downloads").fetch()


@pytest.mark.parametrize("address", ["models:/none@champion", "models:/chargpt@none", "models:/chargpt/7", "x.pt"])
def test_a_model_that_does_not_exist_is_a_user_error(store: Store, address: str) -> None:
    with pytest.raises(UserError, match=address):
        serve.main([address, "--port", "0"])
