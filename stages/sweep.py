"""`python -m stages.sweep NAME -S 'SECTION.KEY=SPACE' …`: search for better params with Optuna.

Each trial is a DVC experiment NAME-1, NAME-2, … and, in MLflow, a child of the run NAME. Trials whose validation loss
is worse than the median of the earlier ones at the same step are stopped. The study is in .runs/sweeps; the same
command continues it.

Spaces, as in Hydra: choice(a,b,c), range(START,STOP[,STEP]) without its end, interval(LOW,HIGH),
tag(log,interval(LOW,HIGH)). Other values are fixed.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
from dvc.api import metrics_show
from filelock import FileLock, Timeout
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from gpt.core.errors import UserError
from gpt.core.params import read_params
from stages.execution.command_line import Parser, enter
from stages.runs.provenance import PARENT_VARIABLE
from stages.runs.run_record import HistoryReader, main_workspace, read, runs

PARAMS, METRIC = Path("params.yaml"), "val/best_loss"
POLL_S = 0.5
SPACE = r"(?:tag\((log),(?=interval))?(choice|range|interval)\(([^()]+)\)(?(1)\))"

Value = float | int | str
Suggest = Callable[[optuna.Trial], Value]


def main(arguments: Sequence[str]) -> int:
    """Run trials until the study has the wanted number; returns 0.

    Raises:
        UserError: wrong options, an unknown key, a second process on the same study, or an experiment failed.
        KeyboardInterrupt: SIGINT or SIGTERM; the study can be continued.
    """
    parser = Parser("python -m stages.sweep", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", help="of the study, and the beginning of its experiments' names")
    parser.add_argument("--trials", type=int, default=20, help="in all, with those of earlier calls")
    parser.add_argument("--seed", type=int, default=1337, help="of the search")
    parser.add_argument("--set", "-S", dest="spaces", action="append", default=[], metavar="SECTION.KEY=SPACE")
    options = parser.parse_args(arguments)
    spaces = {key: parse_space(key, space) for key, _, space in (each.partition("=") for each in options.spaces)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the experiment, too
    folder = main_workspace() / ".runs" / "sweeps"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f"{options.name}.lock", timeout=0):
            study = open_study(folder / f"{options.name}.log", options.name, options.seed)
            while (
                sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in study.trials) < options.trials
            ):
                run_trial(study, spaces)
    except Timeout:
        raise UserError(f"{options.name}: expected an idle study, found one in use; choose another name") from None
    print(f"best: {trial_name(study, study.best_trial)} with {METRIC} {study.best_value:.4f}; apply it with")
    print(f"dvc exp apply {trial_name(study, study.best_trial)}")
    return 0


def parse_space(key: str, text: str) -> Suggest:
    """How a trial chooses the value of a key.

    Raises:
        UserError: there is no such key, or the space is malformed.
    """
    if not re.match(r"(tag|choice|range|interval)\(", text):
        read_params(PARAMS, [f"{key}={text}"])
        return lambda trial: trial.suggest_categorical(key, [text])
    try:
        log, kind, inner = re.fullmatch(SPACE, text.replace(" ", "")).groups()  # type: ignore[union-attr]
        values = inner.split(",")
        read_params(PARAMS, [f"{key}={value}" for value in values])
        if kind == "choice":
            return lambda trial: trial.suggest_categorical(key, values)
        if kind == "range":
            start, stop, step = (*map(int, values), 1)[:3]
            return lambda trial: trial.suggest_int(key, start, stop - 1, step=step)
        low, high = map(float, values)
    except (ValueError, AttributeError):
        raise UserError(f"{key}: expected a space such as interval(0.1,1) or range(2,5), found {text}") from None
    return lambda trial: trial.suggest_float(key, low, high, log=bool(log))


def open_study(path: Path, name: str, seed: int) -> optuna.Study:
    """Create or continue a study. A trial that was interrupted is tried again with the same values."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=3)
    for trial in study.get_trials(states=[TrialState.RUNNING]):
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def trial_name(study: optuna.Study, trial: optuna.Trial | optuna.trial.FrozenTrial) -> str:
    """The name of a trial's DVC experiment."""
    return f"{study.study_name}-{trial.number + 1}"


def run_trial(study: optuna.Study, spaces: dict[str, Suggest]) -> None:
    """Run one experiment; stop it if its validation loss is worse than that of most others at the same step."""
    trial = study.ask()
    name, values = trial_name(study, trial), {key: suggest(trial) for key, suggest in spaces.items()}
    print(f"{name}: {', '.join(f'{key}={value}' for key, value in values.items())}", flush=True)
    changes = [word for key, value in values.items() for word in ("-S", f"{key}={value}")]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", name, *changes]
    environment = {**os.environ, PARENT_VARIABLE: study.study_name}
    log = study_log(study)
    with log.open("a") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        pruned = follow(process, trial, name)
    finally:
        stop(process)
    if pruned:
        study.tell(trial, state=TrialState.PRUNED)
        print(f"{name}: stopped, worse than the median", flush=True)
    elif process.returncode:
        study.tell(trial, state=TrialState.FAIL)
        raise UserError(f"{name}: dvc exp run ended with exit code {process.returncode}; see {log}")
    else:
        loss = float(metrics_show("metrics/train.json", rev=name)[METRIC])
        study.tell(trial, loss)
        print(f"{name}: {METRIC} {loss:.4f}", flush=True)


def study_log(study: optuna.Study) -> Path:
    """The file with the output of all experiments of a study."""
    return main_workspace() / ".runs" / "sweeps" / f"{study.study_name}.txt"


def follow(process: "subprocess.Popen[bytes]", trial: optuna.Trial, name: str) -> bool:
    """Report the validation losses while the experiment runs; returns whether it has to be stopped."""
    reader: HistoryReader | None = None
    reported = 0
    while process.poll() is None:
        time.sleep(POLL_S)
        reader = reader or history_of(name)
        for point in reader.new_points() if reader else []:
            if "val/loss" in point and point["step"] > reported:
                reported = int(point["step"])
                trial.report(point["val/loss"], reported)
        if reported and trial.should_prune():
            return True
    return False


def history_of(name: str) -> HistoryReader | None:
    """The live metrics of the experiment with this name, once its training has begun."""
    for run in runs(main_workspace()):
        if (train := read(run, "train")) and train.name == name:
            return HistoryReader(run / "history.jsonl")
    return None


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop an experiment as Ctrl+C does, if it still runs: the training saves its state."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    process.wait()


if __name__ == "__main__":
    enter("sweep", main)
