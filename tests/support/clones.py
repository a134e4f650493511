"""A project shared through git and a DVC remote, and the kinds of clone in which users work with it."""

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

from dvc.repo import Repo

from tests.support.common import STAGES, run
from tests.support.project import dvc

Clone = Callable[[Path, Path], Path]


def git(folder: Path, *arguments: str | Path) -> str:
    """Run git in a folder; returns its output."""
    return run(["git", *arguments], folder).stdout


def write_placeholders(project: Path) -> list[str]:
    """Write a small file as each output, and a dvc.lock in which all stages are up to date; returns the outputs."""
    entries = [entry for stage in STAGES.values() for entry in (*stage["outs"], *stage.get("metrics", []))]
    outputs = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
    for name in outputs:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(json.dumps(name))
    with chdir(project):
        Repo().commit(force=True)
    return outputs


def share(project: Path, remote: str, **options: str) -> Path:
    """Push the results to a DVC remote with some options, and a commit of them to a bare repository, which is returned.

    The repository is the git remote `origin` of the project afterwards.
    """
    dvc(project, "remote", "add", "--default", "storage", remote)
    for name, value in options.items():
        dvc(project, "remote", "modify", "storage", name, value)
    dvc(project, "push")
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "results")
    origin = project.with_name("origin.git")
    git(project, "clone", "--quiet", "--bare", project, origin)
    git(project, "remote", "set-url", "origin", origin)
    return origin


def plain(origin: Path, folder: Path) -> Path:
    """The clone of a colleague."""
    git(folder, "clone", "--quiet", origin, folder / "colleague")
    return folder / "colleague"


def detached(origin: Path, folder: Path) -> Path:
    """A clone that is on no branch."""
    place = plain(origin, folder)
    git(place, "checkout", "--quiet", "--detach")
    return place


def shallow(origin: Path, folder: Path) -> Path:
    """A clone that has the newest commit only and is on no branch, as in GitHub Actions."""
    git(folder, "clone", "--quiet", "--depth", "1", origin.as_uri(), folder / "shallow")
    git(folder / "shallow", "checkout", "--quiet", "--detach")
    return folder / "shallow"


def worktree(origin: Path, folder: Path) -> Path:
    """A second working tree of a clone."""
    git(plain(origin, folder), "worktree", "add", "--quiet", folder / "worktree")
    return folder / "worktree"


def submodule(origin: Path, folder: Path) -> Path:
    """A submodule of another repository."""
    git(folder, "init", "--quiet", "parent")
    add = ("submodule", "add", "--quiet", str(origin), "module")
    git(folder / "parent", "-c", "protocol.file.allow=always", *add)
    return folder / "parent" / "module"


def subfolder(origin: Path, folder: Path) -> Path:
    """A folder in a repository with other projects."""
    git(folder, "init", "--quiet", "repository")
    place = plain(origin, folder / "repository")
    shutil.rmtree(place / ".git")
    git(place, "add", "--all", ".")
    git(place, "commit", "--quiet", "--message", "add the project")
    return place


def shared_cache(origin: Path, folder: Path, link: str = "symlink") -> Path:
    """A clone whose outputs are links into a cache elsewhere."""
    place = plain(origin, folder)
    dvc(place, "cache", "dir", "--local", str(folder / "cache"))
    dvc(place, "config", "--local", "cache.type", link)
    return place


CLONES: dict[str, Clone] = {
    kind.__name__: kind for kind in (plain, detached, shallow, worktree, submodule, subfolder, shared_cache)
}
