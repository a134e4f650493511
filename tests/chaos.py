"""`make chaos`: kill the pipeline at random, again and again, and compare what it leaves with an undisturbed run.

A round resets the project, kills `dvc repro` several times (each time one of: everything, dvc, the wrapper, torchrun,
one rank), waits until no process of it is left, and lets the last attempt finish. Then every output, `dvc.lock` and
the row in MLflow must be those of the undisturbed run, and no attempt may have repeated a step that was saved before.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
from mlflow import MlflowClient
from ruamel.yaml import YAML

from tests.support.common import environment, made_up_text, write_params
from tests.support.project import clone, set_processes

OUTPUTS = ["chargpt_nano.pt", "metrics/train.json", "plots/history.csv", "plots/validation.csv", "dvc.lock"]
ORPHANS_GONE_S = 10
STEPS = 250
IN_TRAINING, AT_THE_END = 0.5, 0.25  # shares of the kills
TRAINING_S, END_S = 5, 3
FRESH_CLONE = 0.5  # share of the rounds that begin with a dvc.lock which names what will come out
EARLY = 0.8  # of an undisturbed run: what was continued ends sooner
TARGETS = ("everything", "dvc", "wrapper", "torchrun", "rank")


def main() -> None:
    """Kill, compare, and print the sums; exits with 1 when one ending differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-a-round", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="chargpt-chaos-") as name:
        project, whole, seconds = prepare(Path(name))
        print(f"undisturbed: {seconds:.1f} s", flush=True)
        kills: Counter[str] = Counter()
        resumes = equal = rounds = 0
        while kills.total() < options.kills:
            rounds += 1
            processes = 1 + rounds % 2
            killed, continued, same = one_round(project, whole, processes, options.kills_a_round, chance, seconds)
            kills += killed
            resumes += continued
            equal += same
            print(f"{kills.total()} kills, {resumes} resumes, {equal} of {rounds} endings equal", flush=True)
        print(f"killed: {dict(kills)}")
    sys.exit(equal != rounds)


def prepare(folder: Path) -> tuple[Path, dict[str, bytes], float]:
    """A clone, run once undisturbed; returns it with the contents of its outputs and the seconds that training took."""
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
    assert repro(project, "tokenize").wait() == 0
    shutil.copy(project / "dvc.lock", folder / "dvc.lock")
    began = time.monotonic()
    assert repro(project, "train").wait() == 0
    return project, contents(project), time.monotonic() - began


def one_round(
    project: Path, whole: dict[str, bytes], processes: int, kills: int, chance: random.Random, seconds: float
) -> tuple[Counter[str], int, bool]:
    """Reset, kill some times, finish, compare.

    Returns:
        What was killed, how often training was continued, whether the end is equal and nothing saved was repeated.

    """
    set_processes(project, processes)
    if chance.random() < FRESH_CLONE:
        (project / "dvc.lock").write_bytes(whole["dvc.lock"])
    else:
        shutil.copy(project.parent / "dvc.lock", project / "dvc.lock")
    shutil.rmtree(project / ".dvc" / "cache" / "runs", ignore_errors=True)  # or dvc would not train again
    for output in YAML(typ="safe", pure=True).load(whole["dvc.lock"])["stages"]["train"]["outs"]:
        (project / ".dvc/cache/files/md5" / output["md5"][:2] / output["md5"][2:]).unlink(missing_ok=True)
    shutil.rmtree(project / ".runs")
    shutil.rmtree(project / "mlruns", ignore_errors=True)
    for path in [*project.glob("mlflow.db*"), *(project / name for name in OUTPUTS[:-1]), project / "gpt_nano.log"]:
        path.unlink(missing_ok=True)
    killed: Counter[str] = Counter()
    saved: list[str] = []
    repeated = False
    for _ in range(kills):
        target = chance.choice(TARGETS)
        running = repro(project, "train")
        wait_for_a_moment(project, running, chance, seconds)
        if not kill(running, target, chance):
            break  # it came to its end before
        killed[target] += 1
        repeated |= history(project)[: len(saved)] != saved
        saved = max(saved, saved_history(project), key=len)
    last = repro(project, "train").wait()
    repeated |= history(project)[: len(saved)] != saved
    log_file = project / "gpt_nano.log"
    log = log_file.read_text() if log_file.exists() else ""
    same = last == 0 and contents(project) == whole and row_is_whole(project) and not repeated
    if not same:
        kept = Path(tempfile.mkdtemp(prefix="chargpt-chaos-failed-"))
        shutil.copytree(project, kept, dirs_exist_ok=True)
        differing = [name for name, content in contents(project).items() if content != whole[name]]
        said = (project.parent / "said.txt").read_text()[-1000:]
        what = differing or ("a step that was saved" if repeated else "the row")
        print(f"DIFFERENT: exit {last}, {what}; kept in {kept}; said last: {said}")
    return killed, log.count("continuing after step"), same


def wait_for_a_moment(project: Path, running: "subprocess.Popen[bytes]", chance: random.Random, seconds: float) -> None:
    """Wait for a random moment: of the training, of the final writes, or any; much is dvc's and torch's start."""
    began, kind = time.time(), chance.random()
    if kind < IN_TRAINING:
        wait(running, 4 * seconds, partial(written_since, project, ".runs/*/lock.json", began))
        wait(running, chance.random() * TRAINING_S)
    elif kind < IN_TRAINING + AT_THE_END:
        wait(running, 4 * seconds, partial(written_since, project, OUTPUTS[0], began))
        wait(running, chance.random() * END_S)
    else:
        wait(running, chance.random() * seconds * EARLY)


def written_since(project: Path, pattern: str, moment: float) -> bool:
    """Whether a file has been written after some moment."""
    return any(path.stat().st_mtime > moment for path in project.glob(pattern))


def history(project: Path) -> list[str]:
    """The lines of the history: each says when its step was made."""
    return [line for path in project.glob(".runs/*/history.jsonl") for line in path.read_text().splitlines()]


def saved_history(project: Path) -> list[str]:
    """Those up to the newest resume state; all, when the training has written its results."""
    states = [int(path.stem.partition("-")[2]) for path in project.glob(".runs/*/resume-*.pt")]
    newest = STEPS if all((project / name).exists() for name in OUTPUTS[:-1]) else max(states, default=0)
    return [line for line in history(project) if line.endswith("}") and json.loads(line)["step"] <= newest]


def wait(running: "subprocess.Popen[bytes]", seconds: float, until: Callable[[], bool] = lambda: False) -> None:
    """Let it run for some seconds, or until something has come about, or to its end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and running.poll() is None and not until():
        time.sleep(0.005)


def repro(project: Path, stage: str) -> "subprocess.Popen[bytes]":
    """Start `dvc repro` up to a stage, quietly."""
    command = [str(Path(sys.executable).with_name("dvc")), "repro", stage]
    variables = environment(PYTHONPATH="")
    with (project.parent / "said.txt").open("ab") as said:
        return subprocess.Popen(command, cwd=project, env=variables, stdout=said, stderr=said, start_new_session=True)


def kill(running: "subprocess.Popen[bytes]", target: str, chance: random.Random) -> bool:
    """SIGKILL one process of the tree, or all; returns whether something was killed, when nothing of it is left."""
    try:
        tree = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return False
    victims = [process for process in tree if target == role(process)] or tree  # everything, too, where it is too early
    if target == "rank" and victims:
        victims = [chance.choice(victims)]
    for victim in victims:
        victim.kill()
    if victims:
        running.poll()
        _, alive = psutil.wait_procs(tree, timeout=ORPHANS_GONE_S)
        alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        assert not alive, f"orphans after killing {target}: {[process.cmdline() for process in alive]}"
    running.wait()
    return bool(victims)


def role(process: psutil.Process) -> str:
    """What a process of the tree is."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return ""
    if "stages.train" in line:
        return "wrapper"
    if any(word.endswith("torchrun") for word in line):
        return "torchrun"
    if "gpt" in line:
        return "rank"
    return "dvc" if any(word.endswith("dvc") for word in line) else ""


def contents(project: Path) -> dict[str, bytes]:
    """The bytes of every output; nothing for one that is missing."""
    return {name: path.read_bytes() if (path := project / name).exists() else b"" for name in OUTPUTS}


def row_is_whole(project: Path) -> bool:
    """One row, finished, each step of the history once."""
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    rows = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    if len(rows) != 1 or rows[0].info.status != "FINISHED":
        return False
    steps = [metric.step for metric in client.get_metric_history(rows[0].info.run_id, "train_loss")]
    return sorted(steps) == list(range(10, STEPS + 1, 10))


if __name__ == "__main__":
    main()
