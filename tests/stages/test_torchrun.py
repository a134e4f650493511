"""Torchrun's environment from the variables that a user or a launcher sets, and `stages.join` on the other machines."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.core.errors import UserError
from stages.execution import torchrun
from tests.support.common import (
    FAST,
    ROOT,
    TRAINED,
    contents,
    environment,
    free_port,
    only_line,
    run,
    train_line,
    wait_for,
    write_params,
)
from tests.support.project import clone

ENDPOINT = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "10.0.0.1:29500"}
PAIR = {"PET_NNODES": "2", "PET_MASTER_ADDR": "10.0.0.1", "PET_MASTER_PORT": "29500"}
KUBEFLOW = PAIR | {"PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "4"}
NODE_0 = {"PET_RDZV_BACKEND": "static", "PET_RDZV_ENDPOINT": "10.0.0.1:29500", "PET_STANDALONE": "0"}


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*KUBEFLOW, *ENDPOINT, "PET_RDZV_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_all(variables: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        variables.setenv(name, value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (ENDPOINT, NODE_0 | {"PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "2"}),
        (PAIR, NODE_0 | {"PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "2"}),
        (KUBEFLOW, NODE_0 | {"PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "4"}),
        (KUBEFLOW | {"PET_NPROC_PER_NODE": "auto"}, NODE_0 | {"PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "2"}),
        (KUBEFLOW | {"PET_NNODES": "1", "PET_NODE_RANK": "0"}, {"PET_STANDALONE": "1", "PET_LOCAL_ADDR": "127.0.0.1"}),
        ({}, {"PET_STANDALONE": "1", "PET_NPROC_PER_NODE": "2"}),
        ({"MASTER_ADDR": "192.0.2.1", "RANK": "3", "WORLD_SIZE": "4"}, {"PET_STANDALONE": "1"}),  # left in a shell
    ],
)
def test_variables_of_launchers(variables: pytest.MonkeyPatch, given: dict[str, str], expected: dict[str, str]) -> None:
    set_all(variables, given)
    found = torchrun.training_environment(2)
    assert found.items() >= expected.items()
    assert found["OMP_NUM_THREADS"] == "1"
    assert ("PET_RDZV_ENDPOINT" in found) == ("PET_RDZV_ENDPOINT" in expected)


def test_a_variable_that_is_missing_or_wrong_is_named(variables: pytest.MonkeyPatch) -> None:
    for given, message in [
        (PAIR | {"PET_MASTER_PORT": ""}, "PET_MASTER_PORT: expected beside PET_MASTER_ADDR"),
        (PAIR | {"PET_MASTER_ADDR": ""}, "PET_MASTER_ADDR: expected beside PET_MASTER_PORT"),
        ({"PET_NNODES": "2"}, "PET_MASTER_ADDR: expected beside PET_NNODES"),
        ({"PET_MASTER_ADDR": "10.0.0.1"}, "PET_NNODES: expected beside PET_MASTER_ADDR"),
        ({"PET_NODE_RANK": "1"}, "PET_NNODES: expected beside PET_NODE_RANK"),
        (PAIR | {"PET_NNODES": "1:4"}, "PET_NNODES: expected 1, 2, 4, … machines, found '1:4'"),
        (PAIR | {"PET_NODE_RANK": "2"}, "PET_NODE_RANK: expected 0 to 1, found '2'"),
        (PAIR | {"PET_MASTER_PORT": "x"}, "PET_MASTER_PORT: expected a port, found 'x'"),
        (ENDPOINT | {"PET_RDZV_ENDPOINT": "10.0.0.1"}, "PET_RDZV_ENDPOINT: expected HOST:PORT, found '10.0.0.1'"),
        (PAIR | {"PET_RDZV_BACKEND": "c10d"}, "PET_RDZV_BACKEND: expected static, found 'c10d'"),
    ]:
        with variables.context() as patch:
            set_all(patch, given)
            with pytest.raises(UserError) as error:
                torchrun.nodes()
        assert str(error.value).startswith(message)


def test_the_command_for_other_machines_is_printed_unless_a_launcher_runs_it(variables: pytest.MonkeyPatch) -> None:
    set_all(variables, PAIR)
    message = torchrun.command_for_other_nodes(["torchrun", "a b"])
    assert message.endswith("PET_RDZV_ENDPOINT=10.0.0.1:29500 python -m stages.join torchrun 'a b'")
    variables.setenv("DVC_STAGE", "train")
    assert torchrun.command_for_other_nodes(["torchrun"]).endswith("python -m stages.join")
    variables.setenv("PET_NODE_RANK", "0")
    assert torchrun.command_for_other_nodes(["torchrun"]) == ""


def test_waiting_for_node_0_ends(variables: pytest.MonkeyPatch) -> None:
    variables.setattr(torchrun, "JOIN_S", 0)
    endpoint = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"{endpoint}: expected node 0 at this address"):
        torchrun.wait_for_node_0(endpoint)


@pytest.mark.parametrize(
    ("folder", "more", "message"),
    [(".", {"DVC_STAGE": "train"}, "run python -m stages.join there"), ("missing", {}, "missing: expected the token")],
)
def test_dvc_and_missing_tokens_are_refused_on_other_machines(
    folder: str, more: dict[str, str], message: str, tmp_path: Path
) -> None:
    write_params(tmp_path / "params.yaml")
    (tmp_path / "dvc.yaml").write_text("stages: {train: {cmd: x}}")
    command = [sys.executable, "-m", "stages.train", "torchrun", "-m", "gpt", *train_line(folder)]
    refused = run(command, tmp_path, code=2, env=environment(**KUBEFLOW, **more))
    assert message in only_line(refused.stderr)


@pytest.mark.proof
def test_node_0_that_stays_alone_says_so(tmp_path: Path, tokens: Path) -> None:
    write_params(tmp_path / "params.yaml")
    address = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "PET_RDZV_CONF": "timeout=1"}
    command = [sys.executable, "-m", "stages.train", "torchrun", "-m", "gpt", *train_line(tokens)]
    ended = run(command, tmp_path, code=1, env=environment(**address))
    assert re.fullmatch(r"stages.train: expected 2 machines within \d s, found 1; start .*", only_line(ended.stderr))


def test_two_nodes_with_the_variables_of_kubeflow(tmp_path: Path, corpus: Path, tokens: Path) -> None:
    """Node 1 starts first, with the command of dvc.yaml, in a clone of its own; the bytes are those of one process."""
    node1 = clone(tmp_path / "node1", corpus)
    shutil.copytree(tokens, node1 / "data/tokens")
    single = tmp_path / "single"
    single.mkdir()
    write_params(single / "params.yaml", **FAST, model__dropout=0.1, train__max_steps=20, launch__processes=1)
    for folder in (node1, tmp_path):
        shutil.copy(single / "params.yaml", folder)
    port = str(free_port())
    common = {"PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, "PET_NPROC_PER_NODE": "1"}
    before = sorted(path for path in node1.rglob("*") if "__pycache__" not in path.parts)
    nodes, train = [], ["torchrun", "-m", "gpt", *train_line(tokens)]
    for rank, folder, command in ((1, node1, ["stages.join"]), (0, tmp_path, ["stages.train", *train])):
        variables = environment(**common, PET_NODE_RANK=str(rank), PYTHONPATH=str(node1 if rank else ROOT))
        line, output = [sys.executable, "-m", *command], tmp_path / f"output{rank}"
        with output.open("w") as file:
            nodes.append(subprocess.Popen(line, cwd=folder, env=variables, stdout=file, stderr=file))
        if rank:
            wait_for(lambda: "waiting for node 0" in (tmp_path / "output1").read_text())
    run([sys.executable, "-m", "gpt", *train_line(tokens)], single)
    for node in nodes:
        assert node.wait(60) == 0, (tmp_path / "output0").read_text() + (tmp_path / "output1").read_text()
    assert contents(tmp_path, TRAINED) == contents(single, TRAINED)
    assert sorted(path for path in node1.rglob("*") if "__pycache__" not in path.parts) == before
