"""The registered model: find models, register versions, read their evaluations, write the verdicts of the gate."""

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import register_model
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from gpt.core.errors import UserError
from gpt.core.files import sha256_file
from stages.release.comparison import SEED, Evaluation, Verdict, without_seed
from stages.tracking.logged_model import models_of
from stages.tracking.store import Store

REGISTERED = "chargpt"  # the name of the registered model
CHECKPOINT = "checkpoint.sha256"  # tag of a run and of its LoggedModel
CHAMPION, CHALLENGER = "champion", "challenger"  # aliases
REPORT = "promotion/report.md"  # artifact of the run
HEADING = "## Promotion"  # in a version's description: what is above belongs to the user
ROLLED_BACK = "promotion.rolled_back"  # tag of a version
BLOCKS, METRICS = "blocks.csv", "evaluate.json"  # artifacts of the stage evaluate
BITS = "val/bits_per_char"  # its metric


@dataclass(frozen=True)
class Model:
    """A trained model: its run, and its version once it is registered (otherwise empty)."""

    run_id: str
    name: str  # of the run
    version: str = ""

    def __str__(self) -> str:
        version = f"version {self.version}, " if self.version else ""
        return f"{version}run {self.run_id} ({self.name})"


class Registry:
    """The versions of the registered model in a store."""

    def __init__(self, store: Store) -> None:
        self.store, self.client = store, store.client
        # register_model works with the store of this variable.
        os.environ["MLFLOW_TRACKING_URI"] = self.client.tracking_uri

    def find(self, tags: Mapping[str, str], missing: str) -> Model:
        """The model of the newest run, in any MLflow experiment, that has a checkpoint and one of these tags.

        Raises:
            UserError: there is none, with the text `missing`.
        """
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        for tag, value in tags.items():
            quote = '"' if "'" in value else "'"
            query = f"tags.`{tag}` = {quote}{value}{quote}"
            for run in self.client.search_runs(experiments, query, order_by=["attributes.start_time DESC"]):
                if CHECKPOINT in run.data.tags:
                    return self.model(run.info.run_id)
        raise UserError(missing)

    def model(self, run_id: str) -> Model:
        """The model of a run, with the newest version that was registered of it.

        Raises:
            UserError: there is no such run, or it was deleted.
        """
        run = self._run(run_id)
        if run.info.lifecycle_stage == "deleted":
            restore = f"mlflow runs restore --run-id {run_id}"
            raise UserError(f"the run {run.info.run_name} was deleted in MLflow; `{restore}` brings it back")
        return Model(run_id, run.info.run_name or run_id[:8], self._version_of(run_id))

    def champion(self) -> Model | None:
        """The model with the alias `champion`.

        Raises:
            UserError: the version has no run, or its run was deleted for good.
        """
        version = self.aliases().get(CHAMPION)
        return self.registered(version) if version else None

    def registered(self, version: str) -> Model:
        """A version with its run."""
        run_id = self.client.get_model_version(REGISTERED, version).run_id or ""
        try:
            return Model(run_id, self._run(run_id).info.run_name or "", version)
        except UserError as error:
            remedy = f"give the alias {CHAMPION!r} to another version in MLflow's UI, or delete it"
            raise UserError(f"version {version} of {REGISTERED}: expected the run of this version; {remedy}") from error

    def versions(self) -> dict[str, ModelVersion]:
        """All versions that exist."""
        found = self.client.search_model_versions(f"name = '{REGISTERED}'")
        return {str(version.version): version for version in found}

    def aliases(self) -> dict[str, str]:
        """The version of each alias; empty if there is no registered model."""
        found = self.client.search_registered_models(f"name = '{REGISTERED}'")
        return {alias: str(version) for model in found for alias, version in model.aliases.items()}

    def evaluation(self, model: Model, *, verify: bool) -> Evaluation:
        """What the gate reads of a model, from the artifacts of its run.

        Args:
            verify: download the checkpoint and compute its SHA-256.

        Raises:
            UserError: the run has no checkpoint or no results of the stage evaluate.
        """
        run = self._run(model.run_id)
        if not (checkpoint := run.data.tags.get(CHECKPOINT, "")):
            raise UserError(
                f"run {model.run_id}: expected a finished training, found no checkpoint; choose another run"
            )
        stored = self._stored_checkpoint(run) if verify else None
        blocks, metrics = self._artifact(run, BLOCKS), json.loads(self._artifact(run, METRICS))
        version = self.versions().get(model.version)
        return Evaluation(
            checkpoint=checkpoint,
            corpus=_corpus(run),
            blocks=pd.read_csv(StringIO(blocks)),
            calibration_error=metrics["val/calibration_error"],
            copied=metrics["val/copied_windows"],
            params=run.data.params,
            bits_of_seeds=self._bits_of_seeds(run),
            stored=stored,
            rolled_back=version.tags.get(ROLLED_BACK, "") if version else "",
        )

    def register(self, model: Model) -> Model:
        """The model with its version, which is created if there is none; requires the store's lock."""
        version = self._version_of(model.run_id)
        if not version:
            logged = self._logged_model(self._run(model.run_id))
            with redirect_stderr(StringIO()):  # it prints what the report of the promotion says too
                version = register_model(logged.model_uri, REGISTERED).version
        return Model(model.run_id, model.name, str(version))

    def write(self, model: Model, verdict: Verdict, tags: Mapping[str, str], report: str) -> None:
        """Write the verdict on a version as tags, description and artifact; a user's text above ours is kept."""
        self.client.log_text(model.run_id, f"{report}\n", REPORT)
        version = self.client.get_model_version(REGISTERED, model.version)
        written = {"promotion.verdict": "promoted" if verdict.promoted else "kept", "promotion.reason": verdict.reason}
        for name, value in {**written, **tags}.items():
            if version.tags.get(name) != value:
                self.client.set_model_version_tag(REGISTERED, model.version, name, value)
        notes = (version.description or "").partition(HEADING)[0]
        text = f"{notes}{HEADING}\n\n{report}"
        if version.description != text:
            self.client.update_model_version(REGISTERED, model.version, text)

    def challenge(self, model: Model) -> None:
        """Give the alias `challenger` to a version."""
        if self.aliases().get(CHALLENGER) != model.version:
            self.client.set_registered_model_alias(REGISTERED, CHALLENGER, model.version)

    def _bits_of_seeds(self, run: Run) -> list[float]:
        """Bits per character of the runs that have this run's parameters, of the newest one for each seed."""
        found: dict[str, float] = {}
        same = without_seed(run.data.params)
        for other in self.client.search_runs([run.info.experiment_id], order_by=["attributes.start_time DESC"]):
            if BITS in other.data.metrics and same and without_seed(other.data.params) == same:
                found.setdefault(other.data.params.get(SEED, ""), other.data.metrics[BITS])
        return list(found.values())

    def _run(self, run_id: str) -> Run:
        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(f"run {run_id}: expected a run of this store, found none; choose another one") from None

    def _version_of(self, run_id: str) -> str:
        """The newest version of a run; empty if there is none."""
        found = self.client.search_model_versions(f"name = '{REGISTERED}' and run_id = '{run_id}'")
        return str(max((int(version.version) for version in found), default=""))

    def _logged_model(self, run: Run) -> LoggedModel:
        """The LoggedModel of a run's checkpoint, which its version refers to."""
        for model in models_of(self.client, run):
            if model.status == "READY" and model.tags.get(CHECKPOINT) == run.data.tags.get(CHECKPOINT):
                return model
        raise UserError(
            f"run {run.info.run_id} ({run.info.run_name}): expected a LoggedModel with its checkpoint, found none; "
            "restore the checkpoint as the description of the run says, then python -m stages.sync"
        )

    def _stored_checkpoint(self, run: Run) -> str:
        """SHA-256 of the checkpoint in a run's LoggedModel, which is what MLflow loads; empty if there are several."""
        source = self._logged_model(run).model_uri
        with tempfile.TemporaryDirectory() as folder:
            download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=self.client.tracking_uri)
            digests = {sha256_file(path) for path in Path(folder).rglob("*.pt")}
        return digests.pop() if len(digests) == 1 else ""

    def _artifact(self, run: Run, name: str) -> str:
        """The text of an artifact."""
        run_id = run.info.run_id
        if name not in {file.path for file in self.client.list_artifacts(run_id)}:
            raise UserError(
                f"run {run_id} ({run.info.run_name}): expected the artifact {name}, found none; evaluate this model: "
                "restore its checkpoint as its description says, then dvc repro evaluate and python -m stages.sync"
            )
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")


def _corpus(run: Run) -> str:
    """SHA-256 of the text that a model was trained on, from the dataset of its run; empty if it has none."""
    sources: list[Any] = [given.dataset.source for given in run.inputs.dataset_inputs] if run.inputs else []
    return str(json.loads(sources[0]).get("sha256", "")) if sources else ""
