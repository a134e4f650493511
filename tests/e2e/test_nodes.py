"""Two machines train together: two network namespaces on this one, joined by a virtual cable."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pyroute2 import IPRoute, NetNS, netns

from tests.support.common import environment, write_params

HOSTS = {"chargpt0": ("10.77.0.1", "cable0"), "chargpt1": ("10.77.0.2", "cable1")}
OUTPUTS = ["--checkpoint", "model.pt", "--metrics", "m.json", "--history", "h.csv", "--validation", "v.csv"]
TRAIN = ["-m", "gpt", "train", "--params", "params.yaml", "--tokens", "tokens", *OUTPUTS]
TIMEOUT_S = 8


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two hosts that see each other and nothing else; needs root, as CI has."""
    if os.geteuid():
        pytest.skip("only root may make network namespaces")
    remove_hosts()
    with IPRoute() as here:
        for host in HOSTS:
            netns.create(host)
        here.link("add", ifname="cable0", kind="veth", peer="cable1")
        for host, (_, cable) in HOSTS.items():
            here.link("set", index=here.link_lookup(ifname=cable)[0], net_ns_fd=host)
    for host, (address, cable) in HOSTS.items():
        with NetNS(host) as there:
            (index,) = there.link_lookup(ifname=cable)
            there.addr("add", index=index, address=address, prefixlen=24)
            there.link("set", index=index, state="up")
            there.link("set", index=there.link_lookup(ifname="lo")[0], state="up")
    yield
    remove_hosts()


def remove_hosts() -> None:
    for host in set(HOSTS) & set(netns.listnetns()):
        netns.remove(host)


def start(host: str, folder: Path, *command: str, **variables: str) -> "subprocess.Popen[str]":
    """A command on one of the hosts, its words in a file beside it."""
    inside = ["nsenter", f"--net=/var/run/netns/{host}", *command]
    everything = environment(GLOO_SOCKET_IFNAME=HOSTS[host][1], **variables)
    with (folder / "said.txt").open("w") as said:
        return subprocess.Popen(inside, cwd=folder, env=everything, stdout=said, stderr=subprocess.STDOUT, text=True)


def wait_for(folder: Path, text: str) -> str:
    end = time.monotonic() + 40
    while time.monotonic() < end:
        said = (folder / "said.txt").read_text()
        if text in said:
            return said
        time.sleep(0.1)
    raise AssertionError(f"never said {text!r}: {said}")


def start_both(tmp_path: Path, *tokens: Path, **changes: object) -> list["subprocess.Popen[str]"]:
    """Node 0 under its wrapper; node 1 with the very line that the wrapper prints."""
    for name, source in zip(("node0", "node1"), tokens * 2, strict=False):
        (tmp_path / name).mkdir()
        shutil.copytree(source, tmp_path / name / "tokens")
        write_params(tmp_path / name / "params.yaml", launch__timeout=TIMEOUT_S, launch__processes=1, **changes)
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    wrapper = [sys.executable, "-m", "stages.train", torchrun, *TRAIN]
    meeting = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "10.77.0.1:29511"}
    first = start("chargpt0", tmp_path / "node0", *wrapper, **meeting)
    said = wait_for(tmp_path / "node0", "--node-rank=1")
    line = next(line for line in said.splitlines() if "--node-rank=1" in line)
    second = start("chargpt1", tmp_path / "node1", "sh", "-c", f"exec env {line}")
    return [first, second]


@pytest.mark.proof
def test_two_machines_give_the_bytes_of_one_process(hosts: None, tmp_path: Path, tokens: Path) -> None:
    for node in start_both(tmp_path, tokens, train__max_steps=20, model__dropout=0.1):
        assert node.wait(60) == 0, [(tmp_path / name / "said.txt").read_text() for name in ("node0", "node1")]
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "node0" / "params.yaml", alone)
    shutil.copytree(tokens, alone / "tokens")
    subprocess.run([sys.executable, *TRAIN], cwd=alone, env=environment(), check=True, capture_output=True)
    for name in ("model.pt", "m.json", "h.csv", "v.csv"):
        assert (tmp_path / "node0" / name).read_bytes() == (alone / name).read_bytes()
    assert {path.name for path in (tmp_path / "node1").iterdir()} == {"params.yaml", "tokens", "said.txt"}


@pytest.mark.proof
def test_a_cut_cable_ends_both(hosts: None, tmp_path: Path, tokens: Path) -> None:
    nodes = start_both(tmp_path, tokens, train__max_steps=100_000, train__eval_interval=50)
    wait_for(tmp_path / "node0", "step 50/")
    with NetNS("chargpt1") as there:
        there.link("set", index=there.link_lookup(ifname="cable1")[0], state="down")
    began = time.monotonic()
    for node in nodes:
        assert node.wait(TIMEOUT_S + 30) != 0
    assert time.monotonic() - began < TIMEOUT_S + 15
    assert "within 8 s" in (tmp_path / "node0" / "said.txt").read_text()
    assert [process for process in psutil.process_iter(["cwd"]) if str(tmp_path) in str(process.info["cwd"])] == []


@pytest.mark.proof
def test_other_tokens_on_the_other_machine_are_refused(hosts: None, tmp_path: Path, tokens: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tokens, other)
    content = bytearray((other / "train.bin").read_bytes())
    content[0] ^= 1
    (other / "train.bin").write_bytes(content)
    nodes = start_both(tmp_path, tokens, other)
    assert [node.wait(60) != 0 for node in nodes] == [True, True]
    assert "tokens.train.bin" in (tmp_path / "node1" / "said.txt").read_text()
