"""Read-only access to a tracking store and its model registry: creates neither store nor experiment."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow.artifacts
from alembic.util.exc import CommandError
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from gpt.core.errors import UserError
from stages.publish import brief, without_credentials

CHECKPOINT_TAG, KEY_TAG = "checkpoint.sha256", "run.key"
MODEL = re.compile(r"models:/(?:(?P<id>m-[^/@]+)|(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+)))")


@dataclass(frozen=True)
class FoundRun:
    """A run in MLflow."""

    id: str
    name: str
    status: str
    experiment: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    files: Mapping[str, int]  # sizes in bytes of its artifacts, by address

    @property
    def checkpoint(self) -> str:
        """SHA-256 of its checkpoint; empty if it has none."""
        return self.tags.get(CHECKPOINT_TAG, "")


@dataclass(frozen=True)
class FoundModel:
    """A version of a registered model, or a logged model."""

    address: str  # with a version number or id, as `models:/NAME/1`
    label: str
    run_id: str
    files: Mapping[str, int]  # as of a run


class Lookup:
    """Finds runs and models in a tracking store that exists.

    Raises:
        ConnectionError: the store cannot be used; also by the methods.

    """

    def __init__(self, address: str) -> None:
        os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
        for name in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._address = address
        with self._explaining():
            self._client = MlflowClient(address)
            self._experiments = {found.experiment_id: found.name for found in self._client.search_experiments()}

    def runs(self, sha256: str, key: str) -> list[FoundRun]:
        """The active runs, in any experiment, with this checkpoint or this run key, the newest first."""
        found: dict[str, Run] = {}
        with self._explaining():
            for tag, value in ((KEY_TAG, key), (CHECKPOINT_TAG, sha256)):
                if value and self._experiments:
                    order, query = ["attributes.start_time DESC"], f"tags.`{tag}` = '{value}'"
                    runs = self._client.search_runs(list(self._experiments), query, order_by=order)
                    found |= {run.info.run_id: run for run in runs}
            return [self._found(run) for run in found.values() if not sha256 or _may_have(run, sha256)]

    def run(self, run_id: str) -> FoundRun:
        """A run by its id.

        Raises:
            UserError: there is none.

        """
        with self._explaining(f"{run_id}: expected a run in MLflow", "the page Runs of make ui lists them"):
            return self._found(self._client.get_run(run_id))

    def model(self, address: str) -> FoundModel:
        """A model by `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `models:/m-ID`.

        Raises:
            UserError: there is none, or the address has another form.

        """
        match = MODEL.fullmatch(address)
        if not match:
            forms = "models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-ID"
            raise UserError(f"{address}: expected {forms}; correct it")
        name, alias, version = match["name"], match["alias"], match["version"]
        with self._explaining(f"{address}: expected a model in MLflow", "the page Models of make ui lists them"):
            if match["id"]:
                logged = self._client.get_logged_model(match["id"])
                label, run_id = f"{logged.name} ({logged.model_id})", logged.source_run_id or ""
                return FoundModel(address, label, run_id, dict(self._list(address)))
            get = self._client.get_model_version_by_alias if alias else self._client.get_model_version
            return self._version(get(name, alias or version))

    def models_of(self, run_id: str) -> list[FoundModel]:
        """The registered versions of a run's model."""
        with self._explaining():
            found = self._client.search_model_versions(f"run_id='{run_id}'")  # without their aliases
            return [self._version(self._client.get_model_version(each.name, each.version)) for each in found]

    def download(self, address: str, folder: Path) -> Path:
        """Download one artifact of a run or model into a folder."""
        with self._explaining():
            return Path(mlflow.artifacts.download_artifacts(address, dst_path=str(folder), tracking_uri=self._address))

    @contextmanager
    def _explaining(self, expected: str = "", remedy: str = "") -> Iterator[None]:
        """Turn an error into a UserError if something is expected to exist and does not, else a ConnectionError."""
        try:
            yield
        except (MlflowException, SQLAlchemyError, CommandError, OSError) as error:  # requests raises OSErrors
            missing = isinstance(error, MlflowException) and error.error_code in (
                "RESOURCE_DOES_NOT_EXIST",
                "INVALID_PARAMETER_VALUE",
            )
            if expected and missing:
                raise UserError(f"{expected}, found: {error}; {remedy}") from None
            raise ConnectionError(f"{without_credentials(self._address)}: {brief(error)}") from error

    def _found(self, run: Run) -> FoundRun:
        info = run.info
        experiment = self._experiments.get(info.experiment_id, "")
        files = {f"runs:/{info.run_id}/{path}": size for path, size in self._files_of_run(info.run_id, None)}
        return FoundRun(info.run_id, info.run_name, info.status, experiment, run.data.tags, run.data.params, files)

    def _files_of_run(self, run_id: str, folder: str | None) -> Iterator[tuple[str, int]]:
        for item in self._client.list_artifacts(run_id, folder):
            if item.is_dir:
                yield from self._files_of_run(run_id, item.path)
            else:
                yield item.path, item.file_size or 0

    def _version(self, version: ModelVersion) -> FoundModel:
        address, aliases = f"models:/{version.name}/{version.version}", ", ".join(version.aliases)
        label = f"{version.name} version {version.version}" + (f" ({aliases})" if aliases else "")
        return FoundModel(address, label, version.run_id or "", dict(self._list(address)))

    def _list(self, address: str) -> Iterator[tuple[str, int]]:
        """Addresses and sizes of a model's files; a path in a listing may start with the name of the folder."""
        for item in mlflow.artifacts.list_artifacts(artifact_uri=address, tracking_uri=self._address):
            below = f"{address}/{item.path.rpartition('/')[2]}"
            if item.is_dir:
                yield from self._list(below)
            else:
                yield below, item.file_size or 0


def _may_have(run: Run, sha256: str) -> bool:
    """Whether a run found by its key has this checkpoint, or none yet."""
    return run.data.tags.get(CHECKPOINT_TAG, sha256) == sha256
