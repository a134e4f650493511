"""The files in deploy/: the Dockerfile passes hadolint, the server for a team has no default password and no open port.

What runs in the containers is tested in tests/e2e/test_team_server.py.
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.common import ROOT, read_yaml, run

DEPLOY = ROOT / "deploy"
HADOLINT = Path(sys.executable).with_name("hadolint")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = read_yaml(DEPLOY / "compose.yaml")
AUTH: dict[str, Any] = read_yaml(DEPLOY / "compose.auth.yaml")
TEXTS = [(DEPLOY / name).read_text(encoding="utf-8") for name in ("compose.yaml", "compose.auth.yaml")]


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [("", "", 0), ("slim-bookworm", "latest", 1), ("--no-install-recommends", "", 1), ("USER 1000", "USER root", 1)],
)
def test_hadolint_accepts_the_dockerfile_and_refuses_faults(tmp_path: Path, old: str, new: str, code: int) -> None:
    (tmp_path / "Dockerfile").write_text(re.sub(r"python:\S+-latest", "python:latest", DOCKERFILE.replace(old, new)))
    run([HADOLINT, tmp_path / "Dockerfile"], ROOT, code=code)


def test_images_install_the_locked_versions_and_do_not_run_as_root() -> None:
    stages = re.split(r"^FROM .* AS ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert [stage.split(maxsplit=1)[0] for stage in stages] == ["base", "server", "pipeline"]
    for stage in stages[1:]:
        assert re.findall(r"^USER (.*)", stage, re.MULTILINE) == ["1000"]
    installs = re.findall(r"pip install (?:.|\\\n)*", DOCKERFILE)
    assert len(installs) == 3
    assert all("--constraint /opt/chargpt/requirements.lock" in line for line in installs)


def test_no_password_has_a_default() -> None:
    required = r"\$\{\w+:\?set it in deploy/\.env\}"
    services = [*COMPOSE["services"].values(), *AUTH["services"].values()]
    given = [item for service in services for item in service["environment"].items()]
    secret = [(name, value) for name, value in given if re.search("PASSWORD|SECRET|KEY", name)]
    assert len(secret) == 9
    assert [name for name, value in secret if not re.fullmatch(required, value)] == []
    for text in TEXTS:
        assert all(re.match(f"{required}@", rest) for rest in re.findall(r"://\w+:(.*@.*)", text))
    names = {name for text in TEXTS for name in re.findall(r"\$\{(\w+):\?", text)}
    example = (DEPLOY / ".env.example").read_text(encoding="utf-8")
    assert set(re.findall(r"^(\w+)=$", example, re.MULTILINE)) == names


def test_only_mlflow_can_be_reached_and_only_from_this_machine() -> None:
    services = COMPOSE["services"]
    assert {name: service["ports"] for name, service in services.items() if "ports" in service} == {
        "mlflow": ["127.0.0.1:${MLFLOW_PORT:-5000}:5000"]
    }
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    assert {name for name, service in services.items() if service["networks"] != ["inside"]} == {"mlflow"}


def test_services_wait_for_each_other_and_keep_their_data_in_named_volumes() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        for name, needed in service.get("depends_on", {}).items():
            if needed["condition"] == "service_healthy":
                assert "test" in services[name]["healthcheck"]
        assert re.search(r":v?\d+\.?\d*|^chargpt-server$", service["image"])
    mounted = {entry.split(":")[0] for service in services.values() for entry in service.get("volumes", [])}
    assert mounted == set(COMPOSE["volumes"]) == {"database", "store"}
