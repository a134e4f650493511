"""Models of the registry as sources of the server."""

from pathlib import Path

from gpt.core.errors import UserError
from gpt.core.files import sha256_file
from stages.runs.publish import brief
from stages.tracking.lookup import Lookup
from stages.tracking.store import Store


class RegisteredSource:
    """A model by its address in MLflow; an alias may name another version later.

    Args:
        folder: for downloads; the caller deletes it.
    """

    def __init__(self, store: Store, address: str, folder: Path) -> None:
        if not address.startswith("models:/"):
            raise UserError(f"{address}: expected models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-ID")
        self.name = address.removeprefix("models:/")
        self._address, self._folder, self._client, self._lookup = address, folder, store.client, Lookup(store)

    def version(self) -> str:
        """The version that the alias names; that of another address never changes."""
        name, _, alias = self.name.partition("@")
        try:
            return str(self._client.get_model_version_by_alias(name, alias).version) if alias else ""
        except Exception as error:  # of MLflow, requests, SQLAlchemy
            raise UserError(f"{self._address}: {brief(error)}; make ui lists the models") from error

    def fetch(self) -> Path:
        """Download the checkpoint.

        Raises:
            UserError: the download failed, or its SHA-256 is not the one that was recorded for the model.
        """
        found = self._lookup.run_of(self._address)
        folder = self._folder / found.id
        folder.mkdir(parents=True, exist_ok=True)
        path = self._lookup.download(self._address, folder, "")
        if not path.is_file():
            raise UserError(
                f"{self._address}: expected a checkpoint, found none; python -m stages.sync stores it again"
            )
        if (sha256 := sha256_file(path)) != found.record.checkpoint:
            raise UserError(
                f"{self._address}: expected a checkpoint with the SHA-256 {found.record.checkpoint}, found {sha256}; "
                "the file in the store was changed: delete it, then python -m stages.sync"
            )
        return path
