"""A Slurm cluster of two nodes on this machine: the real daemons of Debian, configured in a private folder."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.common import environment, free_port, run, wait_for

PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}  # by program
PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/bin"
CONFIG = """\
ClusterName=chargpt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ReturnToService=2
KillWait=20
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def install() -> None:
    """Install Debian's packages; the test is skipped where that is not possible, and says what is missing."""
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)]
    if missing and not os.geteuid() and shutil.which("apt-get"):
        run(["apt-get", "install", "--yes", "--no-install-recommends", *missing], Path("/"))
    elif missing or os.geteuid():
        pytest.skip(f"needs root and Debian's packages {' '.join(PACKAGES.values())}")


class Slurm:
    """The commands of a user of the cluster."""

    def __init__(self, folder: Path) -> None:
        self._environment = environment(SLURM_CONF=str(folder / "slurm.conf"), PYTHONPATH="", DVC_NO_ANALYTICS="1")
        self._environment["PATH"] += ":/usr/sbin:/usr/bin"

    def __call__(self, *command: str | Path, folder: Path = Path("/")) -> str:
        """Run a command; returns its output."""
        return run(command, folder, env=self._environment).stdout.strip()

    def start(self, *command: str | Path, log: Path) -> "subprocess.Popen[bytes]":
        with log.open("a") as file:
            return subprocess.Popen(command, env=self._environment, stdout=file, stderr=file, start_new_session=True)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, …"""
        return dict(word.split("=", 1) for word in self("scontrol", "-o", "show", "job", job).split() if "=" in word)[
            "JobState"
        ]


@contextmanager
def cluster() -> Iterator[Slurm]:
    """Start the daemons, and stop them with all jobs."""
    install()
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        ports = [free_port() for _ in range(3)]
        (folder / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname(), folder=folder, ports=ports))
        (folder / "cgroup.conf").touch()
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge.key").chmod(0o600)
        slurm = Slurm(folder)
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "pid", "seed", "log")]
        daemons = [("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)]
        daemons += [("slurmctld", "-D"), ("slurmd", "-D", "-N", "node0"), ("slurmd", "-D", "-N", "node1")]
        started = []
        try:
            for words in daemons:
                started.append(slurm.start(*words, log=folder / "daemons.log"))
                if words[0] == "munged":
                    wait_for((folder / "munge.socket").exists)
            wait_for(lambda: slurm("sinfo", "--noheader", "--format=%T %D", "--partition=low") == "idle 2")
            yield slurm
            slurm("scancel", "--user=root")
        finally:
            for daemon in reversed(started):
                daemon.terminate()
                daemon.wait(30)
