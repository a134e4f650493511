"""What the tests of the whole pipeline share: a clone with tiny params, the real dvc, and the store that it fills."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run
from ruamel.yaml import YAML

from tests.support.common import ROOT, environment, write_params

T = TypeVar("T")
QUEUE_S = 240
OUTPUTS = [
    "chargpt_nano.pt",
    "generation_out.txt",
    "metrics/train.json",
    "metrics/evaluate.json",
    "plots/history.csv",
    "plots/validation.csv",
    "plots/positions.csv",
    "plots/calibration.csv",
    "data/tokens/train.bin",
    "dvc.lock",
]


def clone(folder: Path, corpus: Path) -> Path:
    """The working tree as a fresh clone, with tiny params and a text that needs no network."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    changed = subprocess.run(
        ["git", "ls-files", "--modified", "--others", "--exclude-standard", "--deduplicate"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.split()
    for name in changed:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    write_params(
        folder / "params.yaml",
        download__sources=[str(corpus)],
        download__sha256=None,
        train__max_steps=40,
        generate__max_new_tokens=30,
        generate__prompts=["the ", ""],
    )
    (folder / "dvc.lock").unlink(missing_ok=True)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com"]
    subprocess.run([*git, "add", "--all"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "tiny params"], cwd=folder, check=True)
    return folder


def dvc(folder: Path, *arguments: str, **changes: str) -> "subprocess.CompletedProcess[str]":
    """Run dvc to its good end."""
    done = subprocess.run(
        command(*arguments), cwd=folder, env=variables(**changes), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def start(folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start dvc, its words in a file beside the clone: a pipe would stay open as long as what it leaves behind."""
    with said(folder).open("ab") as words:
        return subprocess.Popen(
            command(*arguments), cwd=folder, env=variables(), stdout=words, stderr=words, start_new_session=True
        )


def said(folder: Path) -> Path:
    return folder.parent / "said.txt"


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("dvc")), *arguments]


def variables(**changes: str) -> dict[str, str]:
    """The environment of a person whom dvc does not measure and git knows."""
    person = {f"GIT_{role}_{what}": "t@example.com" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return environment(PYTHONPATH="", DVC_NO_ANALYTICS="1", **person, **changes)


def wait_for(what: Callable[[], T], seconds: float = 120, pause: float = 0.1) -> T:
    """The first answer that is not empty."""
    limit = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(pause)
    return found


def processes_in(folder: Path) -> list[psutil.Process]:
    """All that run in a folder or below it."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
    return found


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, and wait until nothing is left of them."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


def rows(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def set_processes(folder: Path, processes: int) -> None:
    set_params(folder, launch={"processes": processes})


def set_params(project: Path, **sections: dict[str, object]) -> None:
    yaml = YAML()
    params = yaml.load((project / "params.yaml").read_text())
    for section, values in sections.items():
        params[section].update(values)
    yaml.dump(params, project / "params.yaml")


def artifacts(client: MlflowClient, run_id: str, folder: str | None = None) -> list[str]:
    found: list[str] = []
    for item in client.list_artifacts(run_id, folder):
        found += artifacts(client, run_id, item.path) if item.is_dir else [item.path]
    return found


def work_off(project: Path, names: set[str], *, jobs: int) -> list[list[set[int]]]:
    """Let the queue's workers run until these experiments are there; returns the torchruns' ports at each look."""
    seen: list[list[set[int]]] = []

    def done() -> bool:
        seen.append([found for process in processes_in(project) if (found := ports_of(process))])
        return names <= experiments(project)

    assert start(project, "queue", "start", "--jobs", str(jobs)).wait(QUEUE_S) == 0
    try:
        wait_for(done, QUEUE_S, pause=0.5)
    finally:
        stop_workers(project)
    return seen


def stop_workers(project: Path) -> None:
    """Ask the queue's workers to end, which are daemons, and see to it that nothing runs in the folder."""
    if processes_in(project):
        subprocess.run(
            command("queue", "stop", "--kill"),
            cwd=project,
            env=variables(),
            capture_output=True,
            check=False,
            timeout=60,
        )
    kill(processes_in(project))


def ports_of(process: psutil.Process) -> set[int]:
    """The ports that a torchrun listens on."""
    try:
        if not any(word.endswith("torchrun") for word in process.cmdline()):
            return set()
        return {link.laddr.port for link in process.net_connections("tcp") if link.status == psutil.CONN_LISTEN}
    except psutil.Error:
        return set()


def states(project: Path) -> list[Path]:
    """The resume states, from step 40, of a run that is under way or was killed; a finished one holds no lock."""
    states = (path for lock in project.glob(".runs/*/lock.json") for path in lock.parent.glob("resume-*.pt"))
    return [path for path in states if path.name >= "resume-000000040.pt"]


def references(project: Path) -> dict[str, str]:
    """The experiments that are there, by name."""
    words = ["git", "for-each-ref", "--format=%(refname)", "refs/exps"]
    lines = subprocess.run(words, cwd=project, text=True, capture_output=True, check=True).stdout.split()
    return {line.split("/")[4]: line for line in lines if re.match(r"refs/exps/[0-9a-f]{2}/[0-9a-f]{38}/", line)}


def experiments(project: Path) -> set[str]:
    return set(references(project))
