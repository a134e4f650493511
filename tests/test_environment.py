"""Unusual environments: other shells and encodings, missing packages, host names and variables of other programs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt.core.errors import UserError
from gpt.training.distributed import process_group
from stages.execution import torchrun
from tests.conftest import RunMain
from tests.support.common import FAST, ROOT, environment, only_line, run, train_line, write_params
from tests.support.project import clone, dvc

# Starts a command on a host of its own, in namespaces, which needs root.
HOST = "import os, sys; from pyroute2 import IPRoute; {}; os.execvp(sys.argv[1], sys.argv[1:])"
LOOPBACK_UP = "IPRoute().link('set', index=1, state='up')"


def test_make_gives_dvc_a_shell_and_the_code_of_this_folder(tmp_path: Path) -> None:
    (tmp_path / "show").write_text('show: ; @echo "$$SHELL [$$PYTHONSAFEPATH]"\n')
    variables = environment(SHELL="/usr/sbin/nologin", PYTHONSAFEPATH="1")
    found = run(["make", "-s", "-f", "Makefile", "-f", tmp_path / "show", "show"], ROOT, env=variables)
    assert found.stdout == "/bin/sh []\n"


@pytest.mark.parametrize("module", ["gpt", "stages.train"])
def test_an_interpreter_without_the_packages_is_named(module: str) -> None:
    """As with `.venv/bin/dvc repro` where the environment is not activated; -S hides the installed packages."""
    command = [sys.executable, "-S", "-m", module]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert f"{sys.executable}; activate the environment: . .venv/bin/activate" in found.stderr


def test_characters_that_the_output_lacks_are_replaced(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpt", "check-params", "é.yaml"]
    found = run(command, tmp_path, code=2, env=environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0"))
    assert "?.yaml: expected a params file" in only_line(found.stderr)


def test_a_rendezvous_left_in_the_shell_is_ignored_without_torchrun(
    run_main: RunMain, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    write_params(tmp_path / "params.yaml", train__max_steps=1)
    run_main(*train_line(tokens))


def test_half_a_rendezvous_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="MASTER_PORT"), process_group(torch.device("cpu"), timeout_s=1):
        pass


def test_without_a_loopback_interface_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "LOOPBACK", "192.0.2.1")  # no address of this machine
    with pytest.raises(UserError, match="expected a loopback interface"):
        torchrun.training_environment(1)


@pytest.mark.proof
@pytest.mark.parametrize("loopback", [True, False])
def test_a_host_whose_name_does_not_resolve_trains_with_its_loopback_interface(
    loopback: bool, tmp_path: Path, tokens: Path
) -> None:
    if os.geteuid():
        pytest.skip("namespaces need root")
    write_params(tmp_path / "params.yaml", **FAST, train__max_steps=2, launch__processes=2, launch__timeout=8)
    shutil.copytree(tokens, tmp_path / "tokens")
    name = "import socket; socket.sethostname('no-such-host.invalid')"
    start = HOST.format(f"{name}; {LOOPBACK_UP}" if loopback else name)
    host = ["unshare", "--uts", "--net", sys.executable, "-c", start]
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    train = [sys.executable, "-m", "stages.train", torchrun, "-m", "gpt", *train_line("tokens")]
    done = run([*host, *train], tmp_path, code=0 if loopback else 2)
    if loopback:
        assert (done.stderr, (tmp_path / "model.pt").is_file()) == ("", True)
    else:
        assert "expected a loopback interface" in only_line(done.stderr)


def test_a_clone_of_a_user_with_autocrlf_has_the_same_bytes(tmp_path: Path) -> None:
    """With Windows line ends the hashes of all code and params would change."""
    run(["git", "clone", "--quiet", "--config", "core.autocrlf=true", str(ROOT), str(tmp_path / "clone")], tmp_path)
    texts = ("*.py", "*.yaml", "*.lock", "*.md", "Makefile")
    files = run(["git", "ls-files", "--", *texts], tmp_path / "clone").stdout.split()
    assert files
    assert [name for name in files if b"\r\n" in (tmp_path / "clone" / name).read_bytes()] == []


@pytest.mark.proof
def test_a_temporary_experiment_runs_its_own_code_also_with_python_safe_path(tmp_path: Path, corpus: Path) -> None:
    project = clone(tmp_path / "project", corpus, launch__processes=1, train__max_steps=2)
    for module in ("gpt/commands/generate.py", "stages/__init__.py"):
        with (project / module).open("a") as file:
            file.write(f"\nprint('{module} of the project')\n")
    output = dvc(project, "exp", "run", "--temp", PYTHONSAFEPATH="1").stdout
    assert "gpt/commands/generate.py of the project" in output
    assert "stages/__init__.py of the project" in output
