"""The links of a chain: files, folders and runs, each with its hashes and the places where it is."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRESENT = "present"  # under its hash or in a listing; its content was not read
VERIFIED = "verified"  # its content was read and has the expected hashes
MISSING = "missing"
DIFFERENT = "different"  # other content than expected
NOT_FETCHED = "not fetched"
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Content:
    """The hashes of a file or a folder."""

    path: Path
    sha256: str  # empty for a folder
    md5: str  # as DVC computes it: that of a folder is of its listing, followed by `.dir`
    files: Mapping[str, "Content"] = field(default_factory=dict)  # of a folder, by relative path


@dataclass
class Place:
    """Where an item is, or should be."""

    where: str  # workspace, DVC cache, MLflow …
    address: str
    state: str = PRESENT
    note: str = ""  # what differs or is missing, and the remedy

    @property
    def is_problem(self) -> bool:
        """Whether the item is not here although it should be."""
        return self.state in (MISSING, DIFFERENT)


@dataclass
class Item:
    """One link of a chain, and the items that it was made of."""

    kind: str
    name: str
    sha256: str = ""  # empty if it is unknown, or of a folder
    md5: str = ""  # as in dvc.lock
    details: dict[str, str] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # other than those of places
    origins: list["Item"] = field(default_factory=list)
    content: Content | None = None  # of a copy on this machine with the expected hashes

    def agrees(self, content: Content) -> bool:
        """Whether a content has the known hashes; false if none is known."""
        pairs = [(self.sha256, content.sha256), (self.md5, content.md5)]
        known = [(expected, found) for expected, found in pairs if expected]
        return bool(known) and all(expected == found for expected, found in known)

    def learn(self, content: Content) -> None:
        """Complete the hashes from a copy that agrees with the known ones."""
        self.content = self.content or content
        self.sha256, self.md5 = self.sha256 or content.sha256, self.md5 or content.md5

    def walk(self) -> Iterator["Item"]:
        """This item and all items that it was made of."""
        yield self
        for origin in self.origins:
            yield from origin.walk()

    def all_problems(self) -> list[str]:
        """What does not match or is missing in the whole chain, one line each."""
        found = []
        for item in self.walk():
            about = f"{item.kind} {item.name}"
            found += [f"{about}: {problem}" for problem in item.problems]
            found += [
                f"{about}: {place.where} {place.address}: {place.state}" + (f", {place.note}" if place.note else "")
                for place in item.places
                if place.is_problem
            ]
        return found

    def to_dict(self) -> dict[str, Any]:
        """The chain as plain values."""
        files = {name: file.sha256 for name, file in self.content.files.items()} if self.content else {}
        plain = {"kind": self.kind, "name": self.name, "sha256": self.sha256, "md5": self.md5}
        places = [{name: value for name, value in vars(place).items() if value} for place in self.places]
        rest = {"files": files, "details": self.details, "places": places, "problems": self.problems}
        origins = {"origins": [origin.to_dict() for origin in self.origins]}
        return {name: value for name, value in {**plain, **rest, **origins}.items() if value}


def content_of(path: Path) -> Content | None:
    """The hashes of a file or folder; None if there is none."""
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        return None
    files = {file.relative_to(path).as_posix(): _file(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return Content(path, "", listing_md5({name: file.md5 for name, file in files.items()}), files)


def listing_md5(files: Mapping[str, str]) -> str:
    """DVC's hash of a folder, from the MD5 of its files by relative path."""
    entries = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    return hashlib.md5(json.dumps(entries).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _file(path: Path) -> Content:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            md5.update(chunk)
    return Content(path, sha256.hexdigest(), md5.hexdigest())
