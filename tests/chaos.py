"""`make chaos`: kill the pipeline at random moments and compare what it leaves with an undisturbed run.

Each round resets the project and kills `dvc repro` several times: all processes, dvc, the wrapper, torchrun or one
rank. After each kill it waits until no process is left, then runs `python -m stages.repair` and starts dvc again. When
the last attempt has finished, every output, `dvc.lock` and the MLflow run must equal those of the undisturbed run, and
no attempt may have repeated a step that had been saved.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import Popen

import psutil

from tests.support.common import contents, made_up_text, read_yaml, write_params
from tests.support.project import clone, logged_steps, output_file, repair, runs, set_params, start

FILES = ["chargpt_nano.pt", "metrics/train.json", "plots/history.csv", "plots/validation.csv"]
OUTPUTS = [*FILES, "dvc.lock"]
ORPHANS_GONE_S = 10
STEPS = 250
IN_TRAINING, AT_THE_END = 0.5, 0.25  # fractions of the kills
TRAINING_S, END_S = 5, 3
FRESH_CLONE = 0.5  # fraction of the rounds that start with the dvc.lock of the finished pipeline
EARLY = 0.8  # fraction of an undisturbed run in which the other kills fall; a resumed run ends sooner
TARGETS = ("everything", "dvc", "wrapper", "torchrun", "rank")


def main() -> None:
    """Kill, compare and print the totals; exit with 1 if the results of any round differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-a-round", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="chargpt-chaos-") as name:
        project, expected, seconds = prepare(Path(name))
        print(f"undisturbed: {seconds:.1f} s", flush=True)
        kills: Counter[str] = Counter()
        resumes = equal = rounds = 0
        while kills.total() < options.kills:
            rounds += 1
            set_params(project, launch={"processes": 1 + rounds % 2})
            reset(project, expected["dvc.lock"] if rng.random() < FRESH_CLONE else None)
            killed, repeated = kill_and_continue(project, options.kills_a_round, rng, seconds)
            kills += killed
            log = project / "gpt_nano.log"
            resumes += log.read_text().count("continuing after step") if log.exists() else 0
            equal += equals(project, expected, repeated)
            print(f"{kills.total()} kills, {resumes} resumes, {equal} of {rounds} rounds equal", flush=True)
        print(f"killed: {dict(kills)}")
    sys.exit(equal != rounds)


def prepare(folder: Path) -> tuple[Path, dict[str, bytes], float]:
    """Clone the project and run it once; returns it, the contents of its outputs and the duration of training."""
    corpus = folder / "text.txt"
    corpus.write_text(made_up_text())
    project = clone(folder / "project", corpus)
    write_params(
        project / "params.yaml",
        download__sources=[str(corpus)],
        download__sha256=None,
        train__max_steps=STEPS,
        train__eval_interval=40,
        train__save_interval=10,
        model__dropout=0.1,
        generate__prompts=["the "],
    )
    assert start(project, "repro", "tokenize").wait() == 0
    shutil.copy(project / "dvc.lock", folder / "dvc.lock")
    began = time.monotonic()
    assert start(project, "repro", "train").wait() == 0
    seconds = time.monotonic() - began
    shutil.copy(project / "dvc.lock", folder / "finished.lock")
    return project, contents(project, OUTPUTS), seconds


def reset(project: Path, lock: bytes | None) -> None:
    """Delete all that training has left, also from DVC's cache.

    Args:
        project: the clone.
        lock: content of the finished pipeline's dvc.lock, as in a fresh clone; without it, training was never recorded.

    """
    for output in read_yaml(project.parent / "finished.lock")["stages"]["train"]["outs"]:
        (project / ".dvc/cache/files/md5" / output["md5"][:2] / output["md5"][2:]).unlink(missing_ok=True)
    (project / "dvc.lock").write_bytes(lock or (project.parent / "dvc.lock").read_bytes())
    for folder in (".dvc/cache/runs", ".runs", "mlruns"):
        shutil.rmtree(project / folder, ignore_errors=True)
    for path in [*project.glob("mlflow.db*"), *(project / name for name in FILES), project / "gpt_nano.log"]:
        path.unlink(missing_ok=True)


def kill_and_continue(project: Path, kills: int, rng: random.Random, seconds: float) -> tuple[Counter[str], bool]:
    """Start dvc and kill it, several times, then let it finish.

    Returns:
        What was killed, and whether an attempt repeated a step that had been saved.

    """
    killed: Counter[str] = Counter()
    saved: list[str] = []
    repeated = False
    for attempt in range(kills + 1):
        repair(project)
        running, ended = start(project, "repro", "train"), True
        if attempt < kills:
            wait_for_moment(project, running, rng, seconds)
            target = rng.choice(TARGETS)
            if kill(running, target, rng):
                killed[target] += 1
                ended = False  # psutil has reaped it, so its exit code is unknown
        ended &= running.wait() == 0
        repeated |= history(project)[: len(saved)] != saved
        saved = max(saved, saved_history(project), key=len)
        if ended:
            break
    return killed, repeated


def equals(project: Path, expected: dict[str, bytes], repeated: bool) -> bool:
    """Whether the round ended like the undisturbed run; a project that differs is kept and described."""
    found = contents(project, OUTPUTS)
    differences = [name for name in OUTPUTS if found[name] != expected[name]]
    differences += ["a saved step was trained again"] * repeated + ["the MLflow run"] * (not run_is_complete(project))
    if differences:
        kept = Path(tempfile.mkdtemp(prefix="chargpt-chaos-failed-"))
        shutil.copytree(project, kept, dirs_exist_ok=True)
        print(f"DIFFERENT: {differences}; kept in {kept}; last output: {output_file(project).read_text()[-1000:]}")
    return not differences


def run_is_complete(project: Path) -> bool:
    """Whether there is one finished MLflow run that holds each step of the history once."""
    found = runs(project)
    if len(found) != 1 or found[0].info.status != "FINISHED":
        return False
    return sorted(logged_steps(project, found[0].info.run_id)) == list(range(10, STEPS + 1, 10))


def wait_for_moment(project: Path, running: "Popen[bytes]", rng: random.Random, seconds: float) -> None:
    """Wait for a random moment of training, of the final writes, or of the whole run including start-up."""
    began, kind = time.time(), rng.random()
    if kind < IN_TRAINING:
        wait(running, 4 * seconds, partial(written_since, project, ".runs/*/lock.json", began))
        wait(running, rng.random() * TRAINING_S)
    elif kind < IN_TRAINING + AT_THE_END:
        wait(running, 4 * seconds, partial(written_since, project, FILES[0], began))
        wait(running, rng.random() * END_S)
    else:
        wait(running, rng.random() * seconds * EARLY)


def wait(running: "Popen[bytes]", seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    """Wait for some seconds, for a condition or for the end of the process, whichever comes first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and running.poll() is None and not until():
        time.sleep(0.005)


def written_since(project: Path, pattern: str, moment: float) -> bool:
    """Whether a file that matches the pattern has been written after a moment."""
    return any(path.stat().st_mtime > moment for path in project.glob(pattern))


def history(project: Path) -> list[str]:
    """The lines of the history; each holds the time at which its step was trained."""
    return [line for path in project.glob(".runs/*/history.jsonl") for line in path.read_text().splitlines()]


def saved_history(project: Path) -> list[str]:
    """The lines up to the newest resume state, or all of them once training has written its results."""
    states = [int(path.stem.partition("-")[2]) for path in project.glob(".runs/*/resume-*.pt")]
    newest = STEPS if all((project / name).exists() for name in FILES) else max(states, default=0)
    return [line for line in history(project) if line.endswith("}") and json.loads(line)["step"] <= newest]


def kill(running: "Popen[bytes]", target: str, rng: random.Random) -> bool:
    """SIGKILL one process of the tree, or all, and wait until the tree is gone.

    Where the target has not started yet, the whole tree is killed. Returns whether anything was killed.
    """
    try:
        tree = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return False
    victims = [process for process in tree if target == role(process)] or tree
    if target == "rank":
        victims = [rng.choice(victims)]
    for victim in victims:
        victim.kill()
    running.poll()
    _, alive = psutil.wait_procs(tree, timeout=ORPHANS_GONE_S)
    alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not alive, f"orphans after killing {target}: {[process.cmdline() for process in alive]}"
    return True


def role(process: psutil.Process) -> str:
    """The role of a process in the tree of `dvc repro`."""
    try:
        names = {Path(word).name for word in process.cmdline()}
    except psutil.Error:
        return ""
    roles = {"stages.train": "wrapper", "torchrun": "torchrun", "gpt": "rank", "dvc": "dvc"}
    return next((role for name, role in roles.items() if name in names), "")


if __name__ == "__main__":
    main()
