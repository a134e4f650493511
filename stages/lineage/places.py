"""Where a content is now: the workspace, DVC's cache and remotes, MLflow; compared by hash."""

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from stages.lineage.evidence import MD5, Evidence
from stages.lineage.items import DIFFERENT, MISSING, VERIFIED, Content, Item, Place, content_of, listing_md5
from stages.run_record import dvc_cache

if TYPE_CHECKING:
    from stages.tracking.lookup import Lookup

SMALL_BYTES = 1 << 20  # artifacts up to this size are compared by content always, larger ones with --verify


class Finder:
    """Looks for items in all places.

    Files of the workspace are always read: a path says nothing about a content. DVC's cache and remotes store a content
    under its hash, and MLflow's runs have that of their checkpoint as a tag: these are read with `verify` only.
    """

    def __init__(self, evidence: Evidence, tracking: "Lookup | None", *, verify: bool) -> None:
        self._evidence, self._tracking, self._verify = evidence, tracking, verify
        self._root = evidence.root
        self._cache, self._remotes = _dvc_storage(self._root)

    def locate(self, item: Item, paths: Iterable[str]) -> None:
        """Add the places of an item in the workspace (at these paths), DVC's cache and its remotes."""
        recorded = self.locate_in_workspace(item, paths)
        if item.md5:
            self._look_in_cache(item, recorded)
            for remote in self._remotes:
                self._look_in_remote(item, remote)

    def locate_in_workspace(self, item: Item, paths: Iterable[str]) -> str:
        """Add the places in the workspace; returns the path at which its dvc.lock has this content, if any."""
        recorded = ""
        for path in dict.fromkeys(paths):
            lock = self._evidence.workspace
            expected = bool(lock and item.md5 and lock.md5_at(path) == item.md5)
            recorded = path if expected else recorded
            self._look_in_workspace(item, path, expected=expected)
        return recorded

    def locate_in_git(self, item: Item, commit: str, path: str) -> None:
        """Add the place in git, if the file has this content in a commit."""
        text = self._evidence.git("show", f"{commit}:./{path}") if commit and path else b""
        if text and hashlib.sha256(text).hexdigest() == item.sha256:
            item.places.append(Place("git", f"{commit[:12]}:{path}", VERIFIED))

    def locate_tracked(self, item: Item, files: Mapping[str, int], *, named_by_hash: bool) -> None:
        """Add the places of an item among MLflow's artifacts, given by address and size.

        Args:
            named_by_hash: the run or model is known to have this content, so an artifact with the item's file name is
                a copy. Others are compared: a run has the newest text only.

        """
        name = Path(item.name).name
        for address, size in files.items():
            if address.rpartition("/")[2] != name:
                continue
            if named_by_hash and not self._verify:
                item.places.append(Place("MLflow", address))
            elif self._verify or size <= SMALL_BYTES:
                with TemporaryDirectory() as folder:
                    assert self._tracking
                    found = content_of(self._tracking.download(address, Path(folder)))
                    if found and item.agrees(found):
                        item.places.append(Place("MLflow", address, VERIFIED))
                    elif named_by_hash:
                        item.places.append(Place("MLflow", address, DIFFERENT, _found(found)))

    def _look_in_workspace(self, item: Item, path: str, *, expected: bool) -> None:
        remedy = f"dvc checkout --force {shlex.quote(path)}"
        found = content_of(self._root / path)
        if found and item.agrees(found):
            item.learn(found)
            item.places.append(Place("workspace", path, VERIFIED))
        elif found and expected:
            difference = self._difference(item, found) or _found(found)
            item.places.append(Place("workspace", path, DIFFERENT, f"{difference}; restore it: {remedy}"))
        elif expected:
            item.places.append(Place("workspace", path, MISSING, f"restore it: dvc pull or {remedy}"))

    def _look_in_cache(self, item: Item, recorded: str) -> None:
        """DVC's cache should have an output of the workspace, unless dvc.yaml says `cache: false`."""
        stored = self._cache
        if not stored:
            return
        file = stored / _object(item.md5)
        if not file.exists():
            if recorded and recorded not in self._uncached:
                remedy = "dvc pull, or if the workspace has it, dvc commit"
                item.places.append(Place("DVC cache", shown(file, self._root), MISSING, f"restore it: {remedy}"))
            return
        place = Place("DVC cache", shown(file, self._root))
        item.places.append(place)
        read = self._verify or not (item.content or item.sha256)
        self._check(item, place, lambda md5: stored / _object(md5), read=read)

    def _look_in_remote(self, item: Item, remote: str) -> None:
        """A remote need not have an item: pushing is the user's decision."""
        base = f"remote://{remote}/"
        place = Place("DVC remote", base + _object(item.md5).as_posix())
        if _dvc(self._root, "list-url", place.address) is None:
            return
        item.places.append(place)
        if self._verify:
            with TemporaryDirectory() as folder:

                def fetch(md5: str) -> Path:
                    file = Path(folder) / _object(md5).name
                    _dvc(self._root, "get-url", base + _object(md5).as_posix(), str(file))
                    return file

                self._check(item, place, fetch, read=True)

    def _check(self, item: Item, place: Place, fetch: Callable[[str], Path], *, read: bool) -> None:
        """Set the state of a place that stores contents by MD5.

        Args:
            fetch: returns the path of a stored content, which need not exist.
            read: whether to compute the hashes, rather than to check only that all files of a folder are there.

        """
        main = fetch(item.md5)
        listed = _listing(main) if item.md5.endswith(".dir") else {}
        files = {name: fetch(md5) for name, md5 in listed.items()}
        remedy = (
            "delete it there, then dvc pull or dvc commit"
            if place.where == "DVC cache"
            else "delete it there, then dvc push"
        )
        if lost := [f"{name} (MD5 {listed[name]})" for name, file in files.items() if not file.is_file()]:
            place.state, place.note = MISSING, f"{', '.join(lost)}; {remedy}"
        elif read:
            parts = {name: content for name, file in files.items() if (content := content_of(file))}
            found = content_of(main)
            if item.md5.endswith(".dir"):
                found = Content(main, "", listing_md5({name: part.md5 for name, part in parts.items()}), parts)
            wrong = [f"{name} (MD5 {md5})" for name, md5 in listed.items() if parts[name].md5 != md5]
            place.state = VERIFIED if found and item.agrees(found) else DIFFERENT
            if place.state == DIFFERENT:
                place.note = f"{', '.join(wrong) or _found(found)}; {remedy}"
            elif found and place.where == "DVC cache":  # files of a remote are deleted here
                item.learn(found)

    def _difference(self, item: Item, found: Content) -> str:
        """The files in which a folder differs from the listing in DVC's cache."""
        listing = self._cache / _object(item.md5) if self._cache else None
        if not found.files or not listing or not listing.is_file():
            return ""
        expected, got = _listing(listing), {name: file.md5 for name, file in found.files.items()}
        names = [name for name in sorted(expected.keys() | got.keys()) if expected.get(name) != got.get(name)]
        return "; ".join(f"{n}: expected MD5 {expected.get(n, 'none')}, found {got.get(n, 'none')}" for n in names)

    @cached_property
    def _uncached(self) -> set[str]:
        """The outputs of dvc.yaml with `cache: false`."""
        file = self._root / "dvc.yaml"
        stages: dict[str, Any] = (
            (YAML(typ="safe", pure=True).load(file) or {}).get("stages", {}) if file.exists() else {}
        )
        entries = [e for stage in stages.values() for kind in ("outs", "metrics", "plots") for e in stage.get(kind, [])]
        named = {name: flags for entry in entries if isinstance(entry, dict) for name, flags in entry.items()}
        return {name for name, flags in named.items() if (flags or {}).get("cache") is False}


@cache  # each call of dvc takes half a second
def _dvc_storage(root: Path) -> tuple[Path | None, list[str]]:
    """DVC's cache folder, and the names of its remotes."""
    lines = (_dvc(root, "remote", "list") or "").splitlines()
    return dvc_cache(root), [line.split()[0] for line in lines if line.strip()]


def _dvc(root: Path, *arguments: str) -> str | None:
    """The output of dvc; None if it fails."""
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout


def shown(path: Path, root: Path) -> str:
    """A path relative to the workspace, if it is there."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _object(md5: str) -> Path:
    """The path of a content in DVC's cache and remotes."""
    return Path("files", "md5", md5[:2], md5[2:])


def _listing(file: Path) -> dict[str, str]:
    """The MD5 of a folder's files by relative path, from a `.dir` object."""
    try:
        found = {entry["relpath"]: entry["md5"] for entry in json.loads(file.read_text(encoding="utf-8"))}
        return {name: md5 for name, md5 in found.items() if MD5.fullmatch(md5)}
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # its own hash will differ


def _found(content: Content | None) -> str:
    return f"found SHA-256 {content.sha256}" if content and content.sha256 else "found other content"
