"""`python -m stages.serve [MODEL …]`: serve models of the MLflow registry over HTTP, with a page to explore them.

A model is models:/chargpt@champion (the default), models:/chargpt/VERSION or models:/m-ID; several can be compared on
the page. The server is that of `python -m gpt serve`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpt.core.cli import LOG_FILE, logging_to
from gpt.core.errors import UserError
from gpt.fast_import import fast_import
from stages.execution.command_line import Parser, enter
from stages.runs.publish import brief, connect, tracking_uri, without_credentials
from stages.runs.run_record import experiment_name, main_workspace

CHAMPION = "models:/chargpt@champion"


def main(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl+C.

    Raises:
        UserError: wrong options, no such model, the store failed, or the server cannot start.
    """
    parser = Parser("python -m stages.serve", description=__doc__, allow_abbrev=False)
    parser.add_argument("models", metavar="MODEL", nargs="*", default=[CHAMPION])
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a key")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 chooses a free one")
    parser.add_argument("--allow-host", metavar="NAME", action="append", default=[], help="name of the server")
    parser.add_argument("--watch", metavar="SECONDS", type=float, help="look for a new champion this often")
    options = parser.parse_args(arguments)
    root = main_workspace()
    with tempfile.TemporaryDirectory() as folder, logging_to(LOG_FILE, "serve"):
        try:
            registered = fast_import("stages.tracking.registered_source").RegisteredSource
            store = connect(root, experiment_name())
            sources = [registered(store, address, Path(folder)) for address in options.models]
            server = fast_import("gpt.serving.server")
        except ModuleNotFoundError as error:
            raise UserError(f"expected the package {error.name}, found none; pip install 'chargpt[serve]'") from None
        except UserError:
            raise
        except Exception as error:  # of MLflow, requests, SQLAlchemy, the disk …
            raise UserError(f"{without_credentials(tracking_uri(root))}: {brief(error)}") from error
        names = {"host": options.host, "port": options.port, "allowed_hosts": options.allow_host}
        server.serve(sources, server.ServerOptions(**names, watch_s=options.watch))
    return 0


if __name__ == "__main__":
    enter("serve", main)
