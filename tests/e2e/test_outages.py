"""Outages of the tracking store: the training does not notice them, and `stages.sync` repairs their consequences."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.common import wait_for
from tests.support.outages import OUTAGES, Tracking
from tests.support.workspace import Run, Workspace, ended, steps

pytestmark = pytest.mark.proof

FINAL = ("val/best_loss", "val/best_step", "train/parameters")  # metrics with the time of the end
STEPS, SLOW_STEPS = 12, 40  # before the outage begins, and during it
SLOWER, LATER_S = 0.05, 30  # at most: share of the training time, seconds at its end
CASES = [(name, kind) for name, outage in OUTAGES.items() for kind in outage.kinds]


def train(place: Workspace) -> "subprocess.Popen[str]":
    return place.train(hold=True, steps=STEPS, slow_steps=SLOW_STEPS)


def go_on(place: Workspace, process: "subprocess.Popen[str]") -> tuple[str, dict[str, float]]:
    """Let the training end; returns the wrapper's stderr and what the training took."""
    (place.folder / "go").touch()
    stderr = ended(process)
    now = time.time()
    took: dict[str, float] = json.loads((place.folder / "took.json").read_text())
    return stderr, {**took, "end": now - took["ended"]}


def without_times(run: Run) -> Run:
    """What repeats exactly in another run."""
    metrics = {k: v for k, v in run["metrics"].items() if not k.startswith("system/")}
    metrics["train/tokens_per_second"] = [(step, time, 0) for step, time, _ in metrics["train/tokens_per_second"]]
    for name in FINAL:
        metrics[name] = [(step, 0, value) for step, _, value in metrics[name]]
    page = re.sub(r"Trained .* UTC|training_s \| \d+", "", run["tags"]["mlflow.note.content"])
    return {**run, "times": 0, "metrics": metrics, "tags": {**run["tags"], "mlflow.note.content": page}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> tuple[Run, dict[str, float]]:
    """The MLflow run of a training without an outage, and what the training took."""
    place = Workspace(tmp_path_factory.mktemp("undisturbed") / "work space", empty_store)
    process = train(place)
    wait_for(lambda: (runs := place.runs()) and len(steps(runs[0], "train/loss")) == STEPS)
    stderr, took = go_on(place, process)
    assert stderr == ""
    (run,) = place.runs()
    assert steps(run, "train/loss") == list(range(STEPS + SLOW_STEPS))
    return without_times(run), took


@pytest.fixture
def tracking(tmp_path: Path, empty_store: Path, request: pytest.FixtureRequest) -> Iterator[Tracking]:
    tracking = Tracking(tmp_path, request.param, empty_store)
    yield tracking
    tracking.close()


@pytest.mark.parametrize(("name", "tracking"), CASES, indirect=["tracking"])
def test_an_outage_costs_a_line_and_is_repaired_by_sync(
    name: str, tracking: Tracking, undisturbed: tuple[Run, dict[str, float]]
) -> None:
    outage, place, (expected, usual) = OUTAGES[name], tracking.place, undisturbed
    with ExitStack() as during:
        if outage.from_start:
            during.enter_context(outage.begin(tracking))
        process = train(place)
        if not outage.from_start:
            wait_for(lambda: (runs := tracking.runs()) and len(steps(runs[0], "train/loss")) == STEPS)
            during.enter_context(outage.begin(tracking))
        stderr, took = go_on(place, process)
    print(
        f"{name}: {took['seconds']:.2f} / {usual['seconds']:.2f} s, CPU {took['wrapper_cpu']:.2f} / "
        f"{usual['wrapper_cpu']:.2f} s, end {took['end']:.1f} / {usual['end']:.1f} s\n{stderr}"
    )
    assert took["seconds"] <= usual["seconds"] * (1 + SLOWER)
    assert took["wrapper_cpu"] <= usual["wrapper_cpu"] + usual["seconds"] * SLOWER
    assert took["end"] <= usual["end"] + LATER_S
    assert stderr.count("\n") == outage.warns, stderr
    assert outage.cause in stderr
    assert ("`python -m stages.sync`" in stderr) == outage.warns
    assert ended(place.sync()) == ""
    (run,) = tracking.runs()
    assert without_times(run) == expected
