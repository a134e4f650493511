"""A team's tracking server: real PostgreSQL, an S3 server, `mlflow server` with the settings of deploy/compose.yaml."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from stages.runs.publish import CLIENT
from tests.e2e.test_outages import LATER_S, SLOWER, STEPS, go_on, train, undisturbed, without_times  # noqa: F401
from tests.support.common import ROOT, read_yaml, wait_for
from tests.support.team import BIN, VALUES, TeamServer, resolved, team_server
from tests.support.workspace import Run, Workspace, ended, runs_in, steps

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(BIN is None, reason="needs Debian's package postgresql"),
]
Outage = Callable[[TeamServer], AbstractContextManager[None]]
OUTAGES: dict[str, tuple[bool, Outage]] = {  # whether clients write to S3 themselves, and what breaks
    "server killed": (False, lambda server: server.killed()),
    "database killed": (False, lambda server: server.database.killed()),
    "database hangs": (False, lambda server: server.database.hanging()),
    "artifact store killed, its content lost": (False, lambda server: server.s3.killed()),
    "artifact store hangs": (False, lambda server: server.s3.hanging()),
    "clients' artifact store killed, its content lost": (True, lambda server: server.s3.killed()),
    "clients' artifact store hangs": (True, lambda server: server.s3.hanging()),
}


@pytest.fixture(scope="module", params=[False, True], ids=["served", "direct"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeamServer]:
    """A server; its variables are those of this process, too, which reads what the server holds."""
    with (
        team_server(tmp_path_factory.mktemp("server"), direct=request.param) as server,
        pytest.MonkeyPatch.context() as p,
    ):
        for name, value in {**CLIENT, **server.variables}.items():
            p.setenv(name, value)
        server.start()
        yield server


def workspace(folder: Path, server: TeamServer, experiment: str) -> Workspace:
    place = Workspace(folder)
    place.environment |= {**server.variables, "MLFLOW_EXPERIMENT_NAME": experiment}
    return place


def test_four_workspaces_that_publish_at_once(server: TeamServer, tmp_path: Path) -> None:
    """Into an experiment that none of them finds at first. Files go through the server only, or to S3 only."""
    places = [workspace(tmp_path / str(seed), server, "team") for seed in range(4)]
    running = [place.train("-S", f"train.seed={seed}") for seed, place in enumerate(places)]
    assert [ended(process) for process in running] == [""] * 4
    assert [ended(place.sync()) for place in places] == [""] * 4
    found = runs_in(MlflowClient(server.address), "team")
    assert {each["params"]["train.seed"] for each in found} == {"0", "1", "2", "3"}
    for each in found:
        assert steps(each, "train/loss") == list(range(12))
        assert (each["artifacts"]["w.pt"], len(each["models"]), len(each["datasets"])) == ("weights", 1, 1)
    assert len([key for key in server.s3.objects() if key.endswith("/artifacts/w.pt")]) == 4
    assert not server.s3.requests_of_clients()


@pytest.mark.parametrize(("server", "name"), [(OUTAGES[name][0], name) for name in OUTAGES], indirect=["server"])
def test_an_outage_costs_a_line_and_is_repaired_by_sync(
    name: str,
    server: TeamServer,
    tmp_path: Path,
    undisturbed: tuple[Run, dict[str, float]],  # noqa: F811
) -> None:
    (_, outage), (expected, usual) = OUTAGES[name], undisturbed
    place, client = workspace(tmp_path / "work space", server, name), MlflowClient(server.address)
    process = train(place)
    wait_for(lambda: (runs := runs_in(client, name)) and len(steps(runs[0], "train/loss")) == STEPS)
    with outage(server):
        stderr, took = go_on(place, process)
    print(f"{name}: {took['seconds']:.2f} / {usual['seconds']:.2f} s, end {took['end']:.1f} s\n{stderr}")
    assert took["seconds"] <= usual["seconds"] * (1 + SLOWER)
    assert took["end"] <= usual["end"] + LATER_S
    assert stderr.count("\n") == 1
    assert "`python -m stages.sync`" in stderr
    assert not any(secret in stderr for secret in VALUES.values() if secret != "test")
    assert ended(place.sync()) == ""
    (found,) = runs_in(client, name)
    assert without_times(found) == expected


def test_a_database_of_another_version_is_named_with_the_command_that_upgrades_it(tmp_path: Path) -> None:
    """MLflow's server does not start on it; a client that opens the database itself says so in its line."""
    with team_server(tmp_path) as server:
        server.start()
        server.kill()
        server.database.execute("CREATE TABLE kept AS SELECT * FROM alembic_version", "mlflow")
        server.database.execute("UPDATE alembic_version SET version_num = '1bd49d398cd2'", "mlflow")
        place = Workspace(tmp_path / "work space")
        place.environment["MLFLOW_TRACKING_URI"] = server.database.url()
        line = ended(place.train())
        assert line.count("\n") == 1
        assert "mlflow db upgrade" in line
        assert VALUES["POSTGRES_PASSWORD"] not in line
        refused = server.launch()
        wait_for(lambda: "run 'mlflow db upgrade" in server.log())
        assert not server.is_up()
        assert refused.wait(30) != 0
        server.database.execute("UPDATE alembic_version SET version_num = kept.version_num FROM kept", "mlflow")
        server.start()
        place.environment["MLFLOW_TRACKING_URI"] = server.address
        assert ended(place.sync()) == ""
        assert len(runs_in(MlflowClient(server.address))) == 1


def test_with_passwords_a_user_without_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of deploy/compose.auth.yaml."""
    secrets = {**VALUES, "MLFLOW_ADMIN_PASSWORD": "of-the-administrator", "MLFLOW_SECRET_KEY": "of-the-forms"}
    auth = read_yaml(ROOT / "deploy/compose.auth.yaml")
    service = auth["services"]["mlflow"]
    with team_server(tmp_path) as server:
        settings = server.local(resolved(auth["configs"]["basic_auth"]["content"], secrets))
        (tmp_path / "basic_auth.ini").write_text(settings)
        server.words = tuple(service["command"][2:])
        server.more = {name: resolved(value, secrets) for name, value in service["environment"].items()}
        server.more["MLFLOW_AUTH_CONFIG_PATH"] = str(tmp_path / "basic_auth.ini")
        server.start()
        place = Workspace(tmp_path / "work space")
        place.environment["MLFLOW_TRACKING_URI"] = server.address
        line = ended(place.train())
        assert line.count("\n") == 1
        assert "not authenticated" in line
        user = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "of-the-administrator"}
        place.environment |= user
        assert ended(place.sync()) == ""
        for name, value in user.items():
            monkeypatch.setenv(name, value)
        assert len(runs_in(MlflowClient(server.address))) == 1


def test_only_the_allowed_hosts_are_answered(server: TeamServer) -> None:
    page = f"{server.address}/api/2.0/mlflow/experiments/search?max_results=1"
    for host, status in (("localhost:5000", 200), ("127.0.0.1:1234", 200), ("attacker.example", 403)):
        assert requests.get(page, headers={"Host": host}, timeout=20).status_code == status
