"""`make chaos`: kill the pipeline at random moments and compare what it leaves with an undisturbed run.

Each round starts in a new copy of the project and kills `dvc repro` several times: all processes, dvc, the wrapper,
torchrun or one rank. After each kill it waits until no process is left, then runs `python -m stages.repair` and starts
dvc again. When the last attempt has finished, every output, `dvc.lock` and the MLflow run must equal those of the
undisturbed run, and no attempt may have repeated a step that had been saved.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from subprocess import Popen

import psutil

from tests.support.common import contents, made_up_text
from tests.support.project import CHECKPOINT, TRAINED, clone, logged_steps, output_file, repair, runs, set_params, start

OUTPUTS = [*TRAINED, "dvc.lock"]
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
    folder = Path(tempfile.mkdtemp(prefix="chargpt-chaos-"))
    tokenized, expected, seconds = prepare(folder)
    print(f"undisturbed: {seconds:.1f} s", flush=True)
    kills: Counter[str] = Counter()
    resumes = equal = rounds = 0
    while kills.total() < options.kills:
        rounds += 1
        project = copy(tokenized, folder / f"round {rounds}")
        set_params(project, launch={"processes": 1 + rounds % 2})
        if rng.random() < FRESH_CLONE:
            (project / "dvc.lock").write_bytes(expected["dvc.lock"])
        killed, repeated = kill_and_continue(project, options.kills_a_round, rng, seconds)
        kills += killed
        log = project / "gpt_nano.log"
        resumes += log.read_text().count("continuing after step") if log.exists() else 0
        if differences := compare(project, expected, repeated):
            print(f"DIFFERENT: {differences}; see {project} and {output_file(project)}")
        else:
            equal += 1
            shutil.rmtree(project.parent)
        print(f"{kills.total()} kills, {resumes} resumes, {equal} of {rounds} rounds equal", flush=True)
    print(f"killed: {dict(kills)}")
    if equal == rounds:
        shutil.rmtree(folder)
    sys.exit(equal != rounds)


def prepare(folder: Path) -> tuple[Path, dict[str, bytes], float]:
    """Returns a clone without training, the outputs of a training in a copy of it, and the duration of that."""
    corpus = folder / "text.txt"
    corpus.write_text(made_up_text())
    often = {"train__eval_interval": 40, "train__save_interval": 10}
    tokenized = clone(folder / "tokenized" / "project", corpus, train__max_steps=STEPS, **often)
    assert start(tokenized, "repro", "tokenize").wait() == 0
    undisturbed = copy(tokenized, folder / "undisturbed")
    began = time.monotonic()
    assert start(undisturbed, "repro", "train").wait() == 0
    return tokenized, contents(undisturbed, OUTPUTS), time.monotonic() - began


def copy(project: Path, folder: Path) -> Path:
    """Copy a project into a new folder; the output of its commands goes there too."""
    return shutil.copytree(project, folder / project.name)


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


def compare(project: Path, expected: dict[str, bytes], repeated: bool) -> list[str]:
    """What differs from the undisturbed run; its MLflow run holds each step of the history once."""
    found = contents(project, OUTPUTS)
    differences = [name for name in OUTPUTS if found[name] != expected[name]]
    differences += ["a saved step was trained again"] * repeated
    complete = [("FINISHED", [*range(10, STEPS + 1, 10)])]
    if [(run.info.status, sorted(logged_steps(project, run.info.run_id))) for run in runs(project)] != complete:
        differences.append("the MLflow run")
    return differences


def wait_for_moment(project: Path, running: "Popen[bytes]", rng: random.Random, seconds: float) -> None:
    """Wait for a random moment of training, of the final writes, or of the whole run including start-up."""

    def wait(seconds: float, file: str = "") -> None:
        """Wait for some seconds, for a file to be written or for the end of the process, whichever comes first."""
        began = time.time()
        while time.time() < began + seconds and running.poll() is None:
            if file and any(path.stat().st_mtime > began for path in project.glob(file)):
                break
            time.sleep(0.005)

    kind = rng.random()
    if kind < IN_TRAINING:
        wait(4 * seconds, ".runs/*/lock.json")
        wait(rng.random() * TRAINING_S)
    elif kind < IN_TRAINING + AT_THE_END:
        wait(4 * seconds, CHECKPOINT)
        wait(rng.random() * END_S)
    else:
        wait(rng.random() * seconds * EARLY)


def history(project: Path) -> list[str]:
    """The lines of the history; each holds the time at which its step was trained."""
    return [line for path in project.glob(".runs/*/history.jsonl") for line in path.read_text().splitlines()]


def saved_history(project: Path) -> list[str]:
    """The lines up to the newest resume state, or all of them once training has written its results."""
    states = [int(path.stem.partition("-")[2]) for path in project.glob(".runs/*/resume-*.pt")]
    newest = STEPS if all((project / name).exists() for name in TRAINED) else max(states, default=0)
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
