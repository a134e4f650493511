"""`python -m stages.ui [PORT]`: start MLflow's UI for the tracking store, or print the address of its server."""

import os
import socket
import sys
from collections.abc import Sequence

from gpt.core.errors import UserError
from stages.execution.command_line import enter
from stages.execution.torchrun import LOOPBACK
from stages.runs.publish import connect, tracking_uri, without_credentials
from stages.runs.run_record import experiment_name, main_workspace

PORT = 5000


def main(arguments: Sequence[str]) -> int:  # noqa: RET503 (execv does not return)
    """Run the server in this process until it is interrupted.

    Raises:
        UserError: the port is no number, or taken; MLflow cannot open the store.

    """
    root, port = main_workspace(), arguments[0] if arguments else str(PORT)
    address = tracking_uri(root)
    if address.startswith("http"):
        print(f"MLFLOW_TRACKING_URI is a server with its own UI: {without_credentials(address)}")
        return 0
    try:
        socket.create_server((LOOPBACK, int(port))).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(f"port {port}: expected a free port, found: {error}; choose one: make ui PORT=5001") from error
    hosts = f"localhost:*,{LOOPBACK}:*"  # with any port, since an SSH tunnel may end on another one
    os.environ.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", hosts)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    view = connect(root, experiment_name()).loss_view()
    print(f"MLflow: http://{LOOPBACK}:{port}/{view}", flush=True)
    command = ["-m", "mlflow", "ui", "--backend-store-uri", address, "--host", LOOPBACK, "--port", port]
    os.execv(sys.executable, [sys.executable, *command, "--workers", "1"])


if __name__ == "__main__":
    enter("ui", main)
