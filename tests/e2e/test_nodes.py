"""Training on two hosts: two network namespaces of this machine, connected by a virtual cable."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from pyroute2 import IPRoute, NetNS, netns

from tests.support.common import TRAINED, contents, environment, run, train_line, wait_for, write_params

pytestmark = pytest.mark.proof

HOSTS = {"chargpt0": ("10.77.0.1", "cable0"), "chargpt1": ("10.77.0.2", "cable1")}  # by namespace: address, interface
TRAIN = ["-m", "gpt", *train_line("tokens")]
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), *TRAIN]
TIMEOUT_S = 8
StartNodes = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture(autouse=True)
def hosts() -> Iterator[None]:
    """Two hosts that reach each other and nothing else; needs root, as in CI."""
    if os.geteuid():
        pytest.skip("network namespaces need root")
    remove_hosts()
    with IPRoute() as routes:
        for host in HOSTS:
            netns.create(host)
        routes.link("add", ifname="cable0", kind="veth", peer="cable1")
        for host, (_, interface) in HOSTS.items():
            routes.link("set", index=routes.link_lookup(ifname=interface)[0], net_ns_fd=host)
    for host, (address, interface) in HOSTS.items():
        with NetNS(host) as namespace:
            (index,) = namespace.link_lookup(ifname=interface)
            namespace.addr("add", index=index, address=address, prefixlen=24)
            namespace.link("set", index=index, state="up")
            namespace.link("set", index=namespace.link_lookup(ifname="lo")[0], state="up")
    yield
    remove_hosts()


def remove_hosts() -> None:
    for host in set(HOSTS) & set(netns.listnetns()):
        netns.remove(host)


def start(host: str, folder: Path, *command: str, **variables: str) -> "subprocess.Popen[str]":
    """Start a command on a host, with its output in a file."""
    line = ["nsenter", f"--net=/var/run/netns/{host}", *command]
    env = environment(GLOO_SOCKET_IFNAME=HOSTS[host][1], **variables)
    with (folder / "output.txt").open("w") as file:
        return subprocess.Popen(line, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT, text=True)


def output(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def prepare(folder: Path, *tokens: Path, **changes: object) -> list[Path]:
    """The working directories of both nodes, with params and tokens."""
    for name, source in zip(("node0", "node1"), tokens * 2, strict=False):
        (folder / name).mkdir()
        shutil.copytree(source, folder / name / "tokens")
        write_params(folder / name / "params.yaml", launch__timeout=TIMEOUT_S, launch__processes=1, **changes)
    return [folder / "node0", folder / "node1"]


def start_both(folder: Path, *tokens: Path, **changes: object) -> list["subprocess.Popen[str]"]:
    """Start node 0 under the stage's wrapper, and node 1 with the command that the wrapper prints."""
    node0, node1 = prepare(folder, *tokens, **changes)
    rendezvous = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "10.77.0.1:29511"}
    first = start("chargpt0", node0, sys.executable, "-m", "stages.train", *TORCHRUN, **rendezvous)
    wait_for(lambda: "stages.join" in output(node0))
    (line,) = (line for line in output(node0).splitlines() if "stages.join" in line)
    second = start("chargpt1", node1, "sh", "-c", f"exec env {line}")
    return [first, second]


def start_by_launcher(folder: Path, tokens: Path, **changes: object) -> list["subprocess.Popen[str]"]:
    """Start the same command on both nodes, node 1 first, with the variables of Kubeflow Trainer and nothing else."""
    nodes = {}
    for rank, node in reversed([*enumerate(prepare(folder, tokens, **changes))]):
        group = {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_NPROC_PER_NODE": "1"}
        address = {"PET_MASTER_ADDR": "10.77.0.1", "PET_MASTER_PORT": "29511"}
        line = [sys.executable, "-m", "stages.join", *TORCHRUN]
        nodes[rank] = start(f"chargpt{rank}", node, *line, **group, **address)
        wait_for(lambda: "waiting for node 0" in output(folder / "node1"))
    return [nodes[0], nodes[1]]


@pytest.mark.parametrize("start_nodes", [start_both, start_by_launcher])
def test_two_hosts_train_the_bytes_of_one_process(start_nodes: StartNodes, tmp_path: Path, tokens: Path) -> None:
    for node in start_nodes(tmp_path, tokens, train__max_steps=20, model__dropout=0.1):
        assert node.wait(120) == 0, output(tmp_path / "node0") + output(tmp_path / "node1")
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(tmp_path / "node0" / "params.yaml", single)
    shutil.copytree(tokens, single / "tokens")
    run([sys.executable, *TRAIN], single)
    assert contents(tmp_path / "node0", TRAINED) == contents(single, TRAINED)
    assert {path.name for path in (tmp_path / "node1").iterdir()} == {"params.yaml", "tokens", "output.txt"}


def test_both_hosts_stop_when_their_connection_is_lost(tmp_path: Path, tokens: Path) -> None:
    nodes = start_both(tmp_path, tokens, train__max_steps=100_000, train__eval_interval=50)
    wait_for(lambda: "step 50/" in output(tmp_path / "node0"))
    with NetNS("chargpt1") as namespace:
        namespace.link("set", index=namespace.link_lookup(ifname="cable1")[0], state="down")
    began = time.monotonic()
    for node in nodes:
        assert node.wait(TIMEOUT_S + 30) != 0
    assert time.monotonic() - began < TIMEOUT_S + 15
    assert f"{TIMEOUT_S} s" in output(tmp_path / "node0")
    assert [process for process in psutil.process_iter(["cwd"]) if str(tmp_path) in str(process.info["cwd"])] == []


def test_different_tokens_on_the_other_host_are_refused(tmp_path: Path, tokens: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tokens, other)
    content = bytearray((other / "train.bin").read_bytes())
    content[0] ^= 1
    (other / "train.bin").write_bytes(content)
    nodes = start_both(tmp_path, tokens, other)
    assert [node.wait(60) != 0 for node in nodes] == [True, True]
    assert "train.bin" in output(tmp_path / "node1")
