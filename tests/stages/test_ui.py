"""`python -m stages.ui`: MLflow's server on any port."""

import re
import signal
import socket
from contextlib import closing

import requests

from tests.support.common import wait_for
from tests.support.workspace import Workspace, answers, ended


def test_the_ui_answers_also_through_a_tunnel_on_another_port(place: Workspace) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: " in ended(place.start("ui", str(port)), 2)
    server = place.start("ui", str(port))
    assert server.stdout
    view = rf"MLflow: http://127.0.0.1:{port}/#/experiments/\d+/runs\?.*viewStateShareKey=loss"
    assert re.match(view, server.stdout.readline())
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}"))
        address = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0"
        codes = [requests.get(address, headers={"Host": f"{host}:8080"}, timeout=9).status_code for host in HOSTS]
        assert codes == [200, 200, 403]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)


HOSTS = ["localhost", "127.0.0.1", "example.org"]


def test_a_tracking_server_has_its_own_ui(place: Workspace) -> None:
    place.environment["MLFLOW_TRACKING_URI"] = "http://me:secret@host:5000"
    process = place.start("ui")
    assert process.communicate(timeout=60)[0] == "MLFLOW_TRACKING_URI is a server with its own UI: http://host:5000\n"
