"""What MLflow knows of a trained model: its record, the dvc.lock, and where its files are, by SHA-256."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlflow.artifacts import download_artifacts, load_text
from mlflow.exceptions import MlflowException

from gpt.core.errors import UserError
from stages.runs.run_record import Record
from stages.tracking.logged_model import models_of
from stages.tracking.registry import CHECKPOINT, REGISTERED, Registry
from stages.tracking.store import Store


@dataclass(frozen=True)
class FoundRun:
    """A run in MLflow."""

    id: str
    record: Record  # of the training, as far as MLflow has it
    registered: str  # version and aliases of its registered model; empty if there is none
    lock: str  # the text of its dvc.lock; empty if it has none
    copies: dict[str, str]  # SHA-256 of its artifacts and models, by address


class Lookup:
    """Finds runs in a tracking store."""

    def __init__(self, store: Store) -> None:
        self._registry, self._client = Registry(store), store.client  # mlflow's functions use the same store now

    def find(self, sha256: str) -> FoundRun | None:
        """The newest run, in any experiment, with this checkpoint."""
        with suppress(UserError):
            return self.run(self._registry.find({CHECKPOINT: sha256}, "no such run").run_id)
        return None

    def run_of(self, subject: str) -> FoundRun:
        """The run with an ID, or of `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/m-ID`; or UserError."""
        name, _, which = subject.removeprefix("models:/").replace("@", "/").partition("/")
        client = self._client
        get = client.get_model_version_by_alias if "@" in subject else client.get_model_version
        try:
            if not subject.startswith("models:/"):
                return self.run(subject)
            return self.run((get(name, which).run_id if which else client.get_logged_model(name).source_run_id) or "")
        except MlflowException as error:
            raise UserError(f"{subject}: expected a model with a run, found: {error}; make ui lists them") from error

    def run(self, run_id: str) -> FoundRun:
        """A run by its ID; UserError if there is none, or it was deleted."""
        version, run, base = self._registry.model(run_id).version, self._client.get_run(run_id), f"runs:/{run_id}"
        info, tags, datasets = run.info, run.data.tags, run.inputs.dataset_inputs if run.inputs else []
        about = {"name": info.run_name, "status": info.status, "params": run.data.params, "tags": tags}
        about |= {"dataset": json.loads(datasets[0].dataset.profile or "{}") if datasets else {}}
        about |= {"began": info.start_time / 1000, "ended": 0, "checkpoint": tags.get(CHECKPOINT, "")}
        aliases = ", ".join(alias for alias, aliased in self._registry.aliases().items() if aliased == version)
        names = [file.path for folder in (None, "checksums") for file in self._client.list_artifacts(run_id, folder)]
        texts = {name: str(load_text(f"{base}/{name}")) for name in names if name.endswith((".sha256", ".lock"))}
        lines = "".join(text for name, text in texts.items() if name.endswith(".sha256")).splitlines()
        copies = {f"{base}/{name}": sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
        copies |= {f"{base}/{name}": tags.get(CHECKPOINT, "") for name in names if name.endswith(".pt")}
        copies |= {model.model_uri: model.tags.get(CHECKPOINT, "") for model in models_of(self._client, run)}
        registered = f"{REGISTERED} version {version} {f'({aliases})' if aliases else ''}" if version else ""
        return FoundRun(run_id, Record(stage="train", **about), registered, texts.get("dvc.lock", ""), copies)

    def download(self, address: str, folder: Path, _md5: str) -> Path:
        """Download an artifact, or the checkpoint of a model; the returned path does not exist if that fails."""
        try:
            found = Path(download_artifacts(address, dst_path=str(folder)))
        except (MlflowException, OSError):
            return folder / "missing"
        return next(found.rglob("*.pt"), found)
