"""The history of the alias `champion`: who had it from when to when, and who had it before.

Each change is a tag of the registered model, `champion.<time>`, so that no change overwrites another one. If the alias
was moved without this module, the next call of `Champions` that writes adds that change with the time of that call.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from gpt.core.errors import UserError
from gpt.core.files import canonical_json
from stages.tracking.registry import CHALLENGER, CHAMPION, REGISTERED, ROLLED_BACK, Model, Registry

PREFIX = "champion."
PROMOTED, RETURNED, ELSEWHERE = "promoted", "rolled back to", "set outside stages.promote"


@dataclass(frozen=True)
class Change:
    """At a time (ISO 8601, UTC) the alias went to a version, in one of three ways."""

    time: str
    version: str
    how: str


class Champions:
    """Moves the alias and keeps its history; its methods that write require the store's lock."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._client = registry, registry.client

    def changes(self) -> list[Change]:
        """All changes, the oldest first."""
        models = self._client.search_registered_models(f"name = '{REGISTERED}'")
        tags = {key: value for model in models for key, value in model.tags.items() if key.startswith(PREFIX)}
        return [Change(key.removeprefix(PREFIX), **json.loads(tags[key])) for key in sorted(tags)]

    def record_present(self) -> None:
        """Add the change that somebody else made, or that a killed process did not record."""
        changes, present = self.changes(), self._registry.aliases().get(CHAMPION)
        if present and (not changes or changes[-1].version != present):
            self._add(present, ELSEWHERE, changes)

    def promote(self, model: Model) -> None:
        """Give the alias to a version."""
        self._move(model.version, PROMOTED)
        if self._registry.aliases().get(CHALLENGER) == model.version:
            self._client.delete_registered_model_alias(REGISTERED, CHALLENGER)

    def roll_back(self, to: str) -> None:
        """Give the alias back to an earlier champion; the present one is marked, so that it is not promoted again."""
        present = self._registry.aliases()[CHAMPION]
        self._client.set_model_version_tag(REGISTERED, present, ROLLED_BACK, f"{_now():%Y-%m-%d %H:%M:%S} UTC")
        self._move(to, RETURNED)

    def previous(self) -> str:
        """The version that was champion before the present one, without versions that were rolled back or deleted.

        Raises:
            UserError: there is none.
        """
        existing, before = self._registry.versions(), list[str]()
        for change in self.changes():
            if change.how == RETURNED:
                while before and before[-1] != change.version:
                    before.pop()
            if not before or before[-1] != change.version:
                before.append(change.version)
        present = self._registry.aliases().get(CHAMPION)
        usable = {version for version, found in existing.items() if ROLLED_BACK not in found.tags} - {present}
        found = [version for version in before if version in usable]
        if not present or not found:
            raise UserError(
                f"--rollback: expected an earlier champion of {REGISTERED}, found none; see python -m stages.promote "
                "--history, or set the alias in MLflow's UI"
            )
        return found[-1]

    def _move(self, version: str, how: str) -> None:
        """The alias first: of a killed process, `record_present` adds the rest."""
        self._client.set_registered_model_alias(REGISTERED, CHAMPION, version)
        self._add(version, how, self.changes())

    def _add(self, version: str, how: str, changes: list[Change]) -> None:
        """Add a change after all others, also if this machine's clock is behind."""
        now = _now()
        if changes:
            now = max(now, datetime.fromisoformat(changes[-1].time) + timedelta(microseconds=1))
        name = f"{PREFIX}{now:%Y-%m-%dT%H:%M:%S.%fZ}"
        self._client.set_registered_model_tag(REGISTERED, name, canonical_json({"version": version, "how": how}))


def _now() -> datetime:
    return datetime.now(UTC)
