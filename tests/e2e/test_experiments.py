"""What people do all day: experiments beside each other, in a queue, killed, compared; and what holds them up."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from pyroute2 import NetNS, netns
from ruamel.yaml import YAML

from stages.edits import refusing
from tests.support.common import ROOT, environment, write_params
from tests.support.project import (
    QUEUE_S,
    artifacts,
    clone,
    command,
    contents,
    dvc,
    experiments,
    kill,
    processes_in,
    references,
    rows,
    said,
    set_params,
    start,
    states,
    stop_workers,
    variables,
    wait_for,
    work_off,
)

PRESETS = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
TRAINED = ("chargpt_nano.pt", "plots/history.csv", "plots/validation.csv", "metrics/train.json")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Iterator[Path]:
    """A clone in which nothing has run yet, so no store is there either."""
    folder = clone(tmp_path_factory.mktemp("experiments") / "project", corpus)
    yield folder
    stop_workers(folder)


@pytest.fixture(scope="module")
def grid(project: Path) -> dict[str, Any]:
    """Three queued experiments, two at a time, on a store that is not there; by name, what the queue was asked for.

    Also what of the main workspace was there before and after, and the ports that each torchrun listened on.
    """
    before = own_files(project)
    queued: dict[str, dict[str, float]] = {}
    for asked, key, values in (
        ("train.learning_rate=choice(0.01,0.02)", "learning_rate", (0.01, 0.02)),
        ("train.warmup_steps=range(3,5)", "warmup_steps", (3, 4)),
    ):
        names = re.findall("Queued experiment '(.+?)'", dvc(project, "exp", "run", "--queue", "-S", asked).stdout)
        queued |= {name: {key: value} for name, value in zip(names, values, strict=True)}
    dvc(project, "queue", "remove", queued.popitem()[0])  # three are enough
    ports = work_off(project, set(queued), jobs=2)
    return {"asked": queued, "before": before, "after": own_files(project), "ports": ports}


@pytest.mark.proof
def test_every_queued_experiment_is_one_whole_row_of_its_name(project: Path, grid: dict[str, Any]) -> None:
    by_name = {row.info.run_name: row for row in rows(project)}
    assert len(by_name) == len(rows(project)) == 3
    assert set(by_name) == set(grid["asked"]) == experiments(project)
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    for name, (asked,) in ((name, asked.items()) for name, asked in grid["asked"].items()):
        row = by_name[name]
        assert row.info.status == "FINISHED"
        assert row.data.tags["dvc.exp_name"] == name
        assert json.loads(row.data.params[f"train.{asked[0]}"]) == asked[1]
        assert [point.step for point in client.get_metric_history(row.info.run_id, "train_loss")] == [10, 20, 30, 40]
        assert row.info.artifact_uri.startswith((project / "mlruns").as_uri())
        assert {"chargpt_nano.pt", "evaluate.json", "generation_out.txt"} <= set(artifacts(client, row.info.run_id))


@pytest.mark.proof
def test_parallel_first_starts_leave_one_sound_store_and_share_no_port(project: Path, grid: dict[str, Any]) -> None:
    assert list(project.rglob("mlflow.db")) == [project / "mlflow.db"]
    with closing(sqlite3.connect(project / "mlflow.db")) as store:
        assert store.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert store.execute("SELECT name FROM experiments ORDER BY name").fetchall() == [("Default",), ("chargpt",)]
    moments = [ports for ports in grid["ports"] if len(ports) > 1]
    assert moments, "no two trainings at once: nothing is shown"
    for ports in moments:
        assert len(set.union(*ports)) == sum(map(len, ports)), ports


@pytest.mark.proof
def test_the_queue_leaves_the_main_workspace_as_it_is(grid: dict[str, Any]) -> None:
    assert grid["after"] == grid["before"]


@pytest.mark.proof
def test_comparisons_are_there(project: Path, grid: dict[str, Any]) -> None:
    one, other = [name for name, asked in grid["asked"].items() if "learning_rate" in asked]
    table = dvc(project, "exp", "show", "--csv", "--only-changed").stdout.splitlines()
    assert "train.learning_rate" in table[0]
    assert "train.weight_decay" not in table[0]
    found = json.loads(dvc(project, "exp", "show", "--json").stdout)
    shown = {entry["name"] for revision in found for entry in revision["experiments"] or ()}
    assert shown == set(grid["asked"])
    lines = dvc(project, "params", "diff", one, other).stdout.splitlines()
    assert [line.split() for line in lines[1:]] == [["params.yaml", "train.learning_rate", "0.01", "0.02"]]
    figures = dvc(project, "metrics", "diff", one, other).stdout
    assert re.search(r"metrics/evaluate.json +bits_per_char +\d\.\d+ +\d\.\d+ +-?\d\.\d+", figures)
    dvc(project, "plots", "diff", one, other)
    page = (project / "dvc_plots" / "index.html").read_text()
    for title in plot_titles():
        assert page.count(title) == 1
    for name in (one, other):
        assert f'"rev": "{name}"' in page
    status = subprocess.run(["git", "status", "--short"], cwd=project, text=True, capture_output=True, check=True)
    assert status.stdout == ""


@pytest.mark.proof
@pytest.mark.parametrize("where", ["temp", "queue"])
def test_an_experiment_killed_elsewhere_continues_to_the_same_bytes(
    project: Path, where: str, tokens: Path, tmp_path: Path
) -> None:
    """SIGKILL to everything in the middle of training; then the same experiment again."""
    steps, before, name = {"temp": 160, "queue": 161}[where], own_files(project), f"killed-{where}"
    asked = ("--name", name, "-S", f"train.max_steps={steps}")
    run = partial(dvc, project, "exp", "run", f"--{where}")
    if where == "queue":
        run(*asked)
    started = start(project, *(["queue", "start"] if where == "queue" else ["exp", "run", "--temp", *asked]))
    wait_for(lambda: states(project))
    kill(processes_in(project))
    started.wait()
    assert states(project)
    continued = log_of(project).count("continuing after step")
    if where == "queue":
        dvc(project, "queue", "kill", name)  # until it is told, dvc takes it for running
    run(*asked)
    if where == "queue":
        work_off(project, {name}, jobs=1)
    assert log_of(project).count("continuing after step") == continued + 1
    assert trained(project, name) == undisturbed(project, tokens, tmp_path, steps)
    (row,) = [row for row in rows(project) if row.info.run_name == name]
    assert row.info.status == "FINISHED"
    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    points = client.get_metric_history(row.info.run_id, "train_loss")
    assert sorted(point.step for point in points) == sorted({*range(10, steps, 10), steps})
    assert own_files(project) == before
    assert not states(project)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A clone, run once; its text came from a server on this machine that is gone now."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copy(corpus, folder / "text.txt")
    handler = partial(QuietHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        project = clone(folder / "project", corpus)
        set_params(project, download={"sources": [f"http://127.0.0.1:{server.server_port}/text.txt"]})
        dvc(project, "repro")
        server.shutdown()
    return project


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def no_network() -> Iterator[list[str]]:
    """The beginning of a command line whose rest sees no network but its own loopback; needs root, as CI has."""
    if os.geteuid():
        pytest.skip("only root may make network namespaces")
    name = f"chargpt-alone-{os.getpid()}"
    netns.create(name)
    with NetNS(name) as alone:
        alone.link("set", index=alone.link_lookup(ifname="lo")[0], state="up")
    yield ["nsenter", f"--net=/var/run/netns/{name}"]
    netns.remove(name)


@pytest.mark.proof
def test_without_a_network_all_that_is_cached_comes_back_and_new_params_train(
    workspace: Path, no_network: list[str]
) -> None:
    def run(*words: str) -> str:
        line = [*no_network, *command(*words)]
        done = subprocess.run(line, cwd=workspace, env=variables(), text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    before = contents(workspace)
    for name in ("data/shakespeare.txt", "chargpt_nano.pt", "generation_out.txt", "plots/history.csv"):
        (workspace / name).unlink()
    shutil.rmtree(workspace / "data" / "tokens")
    assert "Running stage" not in run("repro")
    assert contents(workspace) == before
    set_params(workspace, train={"max_steps": 50})
    assert "Running stage 'train'" in run("repro", "train")
    assert {row.data.params["train.max_steps"] for row in rows(workspace)} == {"40", "50"}


@pytest.mark.proof
def test_a_second_repro_says_who_is_there_first(workspace: Path, tmp_path: Path) -> None:
    """Beside a running one dvc refuses; where dvc is dead and its children hang, the new training waits for them."""
    set_params(workspace, train={"max_steps": 170})
    started = start(workspace, "repro", "train")
    first = psutil.Process(started.pid)
    wait_for(lambda: states(workspace))
    refused = subprocess.run(
        command("repro", "train"), cwd=workspace, env=variables(), text=True, capture_output=True, check=False
    )
    assert refused.returncode != 0
    assert f"(PID {first.pid}): " in refused.stderr
    assert "dvc repro train" in refused.stderr
    assert f"stage train of PID {first.pid}, on {socket.gethostname()} since " in refused.stderr
    named = subprocess.run(
        [sys.executable, "-m", "stages.mend"], cwd=workspace, text=True, capture_output=True, check=True
    )
    assert (
        f"dvc repro train, PID {first.pid} on {socket.gethostname()} since " in named.stdout
    )  # by `make repro` before it
    (wrapper,) = first.children()
    tree = wrapper.children(recursive=True)
    for process in tree:
        process.suspend()
    kill([first])
    started.wait()
    said(workspace).unlink()
    second = start(workspace, "repro", "train")
    waiting = re.compile(r"waiting for the run lock: the same run is active, PID (\d+) on (\S+) since [-\d]+ [:\d]+")
    found = wait_for(lambda: waiting.findall(said(workspace).read_text()))[0]
    assert int(found[0]) in {process.pid for process in tree}
    assert found[1] == socket.gethostname()
    for process in tree:
        process.resume()  # they find their order to end, which came with dvc's death
    assert second.wait(QUEUE_S) == 0, said(workspace).read_text()
    assert "continuing after step" in said(workspace).read_text()
    assert not [process for process in (wrapper, *tree) if process.is_running()]


@pytest.mark.proof
def test_ctrl_c_is_passed_on_by_dvc_and_the_row_goes_on(workspace: Path) -> None:
    """As a terminal sends it: to dvc and everything below it."""
    set_params(workspace, train={"max_steps": 180})
    running = start(workspace, "repro", "train")
    wait_for(lambda: states(workspace))
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait(QUEUE_S) != 0
    words = said(workspace).read_text()
    assert re.search(r"^gpt train: stopped after step \d+ of 180; run again to continue$", words, re.MULTILINE)
    assert "exited with 75" in words
    assert "Traceback" not in words
    assert [row.info.status for row in rows(workspace) if row.data.params["train.max_steps"] == "180"] == ["KILLED"]
    assert "continuing after step" in dvc(workspace, "repro", "train").stdout
    assert [row.info.status for row in rows(workspace) if row.data.params["train.max_steps"] == "180"] == ["FINISHED"]


@pytest.mark.proof
def test_params_edited_while_training_are_not_what_dvc_files_the_model_under(workspace: Path) -> None:
    set_params(workspace, train={"max_steps": 120})
    running = start(workspace, "repro", "train")
    wait_for(lambda: states(workspace))
    set_params(workspace, train={"max_steps": 30})
    assert running.wait(QUEUE_S) != 0
    assert "stages.train: train.max_steps: edited while this ran" in said(workspace).read_text()
    row = max(rows(workspace), key=lambda row: row.info.start_time)
    assert (row.info.status, row.data.params["train.max_steps"]) == ("FINISHED", "120")  # nothing is lost
    assert "Running stage 'train'" in dvc(workspace, "repro", "train").stdout
    assert json.loads((workspace / "metrics" / "train.json").read_text())["best_step"] <= 30


def test_what_is_edited_while_a_stage_runs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_params(tmp_path / "params.yaml")
    monkeypatch.setenv("DVC_STAGE", "generate")

    def edit(**changes: object) -> int:
        write_params(path, **changes)
        return 0

    line = ["--params", str(path)]
    assert refusing("generate", lambda _: edit(generate__seed=2, train__seed=2))(line) == 2
    assert "stages.generate: generate.seed: edited while this ran" in capsys.readouterr().err
    assert refusing("generate", lambda _: edit(generate__seed=2, train__seed=3))(line) == 0
    monkeypatch.delenv("DVC_STAGE")
    assert refusing("generate", lambda _: edit(generate__seed=4))(line) == 0
    assert not capsys.readouterr().err


def test_dvc_changes_the_lines_that_are_named_and_no_other(tmp_path: Path) -> None:
    """`dvc exp run -S` writes params.yaml anew: the files are laid out as it lays them out."""
    for path in PRESETS:
        shutil.copy(path, tmp_path)
    script = (
        "import sys; from dvc.utils.hydra import apply_overrides as a; [a(f, ['train.seed=7']) for f in sys.argv[1:]]"
    )
    line = [sys.executable, "-c", script, *(str(tmp_path / path.name) for path in PRESETS)]
    subprocess.run(line, env=environment(), check=True)
    for path in PRESETS:
        old, new = path.read_text().splitlines(), (tmp_path / path.name).read_text().splitlines()
        assert len(old) == len(new)
        (changed,) = [line for line, before in zip(new, old, strict=True) if line != before]
        assert changed.startswith("  seed: 7")


def own_files(project: Path) -> dict[str, str]:
    """All files of the main workspace and their MD5, except for what belongs to git, dvc, MLflow and the log."""
    return {
        str(path.relative_to(project)): hashlib.md5(path.read_bytes()).hexdigest()
        for path in project.rglob("*")
        if path.is_file()
        and path.relative_to(project).parts[0] not in (".git", ".dvc", ".runs", "mlruns", "dvc_plots", "gpt_nano.log")
        and not path.name.startswith("mlflow.db")
    }


def log_of(project: Path) -> str:
    path = project / "gpt_nano.log"
    return path.read_text() if path.exists() else ""


def trained(project: Path, name: str) -> dict[str, str]:
    """What dvc.lock says of the files that training wrote in an experiment: their MD5."""
    words = ["git", "show", f"{references(project)[name]}:dvc.lock"]
    lock = subprocess.run(words, cwd=project, text=True, capture_output=True, check=True).stdout
    outputs = YAML(typ="safe", pure=True).load(lock)["stages"]["train"]["outs"]
    return {output["path"]: output["md5"] for output in outputs}


def undisturbed(project: Path, tokens: Path, folder: Path, steps: int) -> dict[str, str]:
    """The MD5 of the same files, trained at one go by one process, without dvc."""
    names = dict(zip(("--checkpoint", "--history", "--validation", "--metrics"), TRAINED, strict=True))
    options = [word for name, path in names.items() for word in (name, path)]
    line = [sys.executable, "-m", "gpt", "train", "--params", str(project / "params.yaml"), "--tokens", str(tokens)]
    subprocess.run(
        [*line, *options, "-S", f"train.max_steps={steps}"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        check=True,
    )
    return {path: hashlib.md5((folder / path).read_bytes()).hexdigest() for path in TRAINED}


def plot_titles() -> list[str]:
    plots = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["plots"]
    return [plot["title"] for entry in plots for plot in entry.values()]
