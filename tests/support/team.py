"""The pieces of deploy/compose.yaml without containers: private PostgreSQL, Moto's S3, and a real `mlflow server`.

The variables and commands are those of compose.yaml, with addresses on the loopback interface.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import psutil
import psycopg
import requests

from tests.support.common import ROOT, free_port, read_yaml, run, wait_for
from tests.support.workspace import answers, start_server

SERVICES: dict[str, Any] = read_yaml(ROOT / "deploy/compose.yaml")["services"]
VALUES = {"POSTGRES_PASSWORD": "of-the-database", "S3_ACCESS_KEY": "test", "S3_SECRET_KEY": "of-the-store"}
BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)  # Debian's package


def resolved(text: str, values: dict[str, str] = VALUES) -> str:
    """A text of a compose file with its variables replaced."""
    return re.sub(r"\$\{(\w+):([?-])([^}]*)\}", lambda m: values.get(m[1], m[3] if m[2] == "-" else ""), text)


class Process:
    """A server process that can be stopped, suspended and started again on the same port."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> "subprocess.Popen[bytes]":
        """Start the process, in a process group of its own."""
        raise NotImplementedError

    def is_up(self) -> bool:
        """Whether it answers."""
        raise NotImplementedError

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._process = self.launch()
        wait_for(self.is_up)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process and to its children, which may be in other process groups."""
        assert self._process
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            for process in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def kill(self) -> None:
        """End it with SIGKILL, if it runs."""
        if self._process:
            self.send(signal.SIGKILL)
            self._process.wait(20)
            self._process = None

    @contextmanager
    def killed(self) -> Iterator[None]:
        """Be dead for a while."""
        self.kill()
        yield
        self.start()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Not answer for a while."""
        self.send(signal.SIGSTOP)
        yield
        self.send(signal.SIGCONT)


class Postgres(Process):
    """A private PostgreSQL cluster. PostgreSQL refuses to run as root, so root runs it as the user `postgres`."""

    def __init__(self) -> None:
        super().__init__()
        assert BIN, "install Debian's package postgresql"
        self._bin = BIN
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's folders are closed to other users
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self._folder, self._user)
        password = self._folder / "password"
        password.write_text(VALUES["POSTGRES_PASSWORD"])
        access = ["--username=mlflow", f"--pwfile={password}", "--auth=scram-sha-256"]
        initdb: list[str | Path] = [
            self._bin / "initdb",
            "--no-sync",
            "--encoding=UTF8",
            *access,
            self._folder / "data",
        ]
        subprocess.run(initdb, check=True, capture_output=True, user=self._user, cwd=self._folder)

    def url(self, database: str = "mlflow") -> str:
        """The address of a database for MLflow, with user and password."""
        return f"postgresql+psycopg://mlflow:{VALUES['POSTGRES_PASSWORD']}@127.0.0.1:{self.port}/{database}"

    def launch(self) -> "subprocess.Popen[bytes]":
        options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self._folder}"]
        line: list[str | Path] = [self._bin / "postgres", "-D", self._folder / "data", "-p", str(self.port), *options]
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(line, user=self._user, cwd=self._folder, stdout=log, stderr=log)

    def is_up(self) -> bool:
        with suppress(psycopg.OperationalError):
            self.execute("SELECT 1")
            return True
        return False

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run a statement of SQL."""
        with psycopg.connect(self.url(database).replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute(statement.encode())

    def delete(self) -> None:
        """Stop the server and delete the cluster."""
        self.kill()
        shutil.rmtree(self._folder)


class S3(Process):
    """Moto's S3 server; its content is lost when it ends."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._log, self.url = log, f"http://127.0.0.1:{self.port}"
        given = {name: resolved(value) for name, value in SERVICES["bucket"]["environment"].items()}
        self.variables = {**given, "MLFLOW_S3_ENDPOINT_URL": self.url}

    def launch(self) -> "subprocess.Popen[bytes]":
        line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        with self._log.open("ab") as log:
            return subprocess.Popen(line, stdout=log, stderr=log)

    def is_up(self) -> bool:
        with suppress(requests.ConnectionError):
            return requests.get(self.url, timeout=5).ok
        return False

    def start(self) -> None:
        """Start it and create the bucket as compose.yaml does."""
        super().start()
        for _ in range(2):  # a second time it changes nothing
            _, *options = SERVICES["bucket"]["command"]
            run([sys.executable, *options], self._log.parent, env=os.environ | self.variables)

    def objects(self) -> set[str]:
        """The keys of all objects in the bucket."""
        access = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        client = boto3.client("s3", endpoint_url=self.url, **access)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
        return {entry["Key"] for page in pages for entry in page.get("Contents", [])}

    def requests_of_clients(self) -> bool:
        """Whether a client of MLflow's server was sent here by it, with an address that the server had signed."""
        return "X-Amz-Signature=" in self._log.read_text()


class TeamServer(Process):
    """MLflow's server with the variables of compose.yaml.

    Attributes:
        direct: whether the clients write artifacts to S3 themselves, else through the server.
        variables: the environment of its clients.
    """

    def __init__(self, folder: Path, *, direct: bool) -> None:
        super().__init__()
        self._folder, self.direct = folder, direct
        self.database, self.s3 = Postgres(), S3(folder / "s3.log")
        self.address = f"http://127.0.0.1:{self.port}"
        self.variables = {"MLFLOW_TRACKING_URI": self.address, **(self.s3.variables if direct else {})}
        self.words: tuple[str, ...] = ()
        self.more: dict[str, str] = {}

    def launch(self) -> "subprocess.Popen[bytes]":
        given = {name: resolved(value) for name, value in SERVICES["mlflow"]["environment"].items()}
        own = {**self.s3.variables, "MLFLOW_BACKEND_STORE_URI": self.local(given["MLFLOW_BACKEND_STORE_URI"])}
        if self.direct:
            own |= {"MLFLOW_SERVE_ARTIFACTS": "false", "MLFLOW_DEFAULT_ARTIFACT_ROOT": "s3://mlflow"}
        return start_server(self._folder, self.port, *self.words, **(given | own | self.more))

    def local(self, text: str) -> str:
        """A text with the address of the database here."""
        return text.replace("database:5432", f"127.0.0.1:{self.database.port}")

    def is_up(self) -> bool:
        return answers(self.address)

    def log(self) -> str:
        """What the server wrote."""
        return (self._folder / "log").read_text()


@contextmanager
def team_server(folder: Path, *, direct: bool = False) -> Iterator[TeamServer]:
    """A server whose database and artifact store are up; it is to be started."""
    with ExitStack() as stack:
        server = TeamServer(folder, direct=direct)
        stack.callback(server.database.delete)
        stack.callback(server.s3.kill)
        stack.callback(server.kill)
        server.s3.start()
        server.database.start()
        server.database.execute("CREATE DATABASE mlflow")
        yield server
