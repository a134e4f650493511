"""Serve checkpoints over HTTP until SIGTERM or Ctrl+C."""

from pathlib import Path
from typing import Annotated

import typer

from gpt.core.cli import LOG_FILE, LogFile, logging_to
from gpt.core.errors import UserError
from gpt.core.params import MAX_TIMEOUT_S


def command(
    checkpoint: Annotated[
        list[Path], typer.Option(metavar="FILE", help="Trained model; repeatable. The first one is the default.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")] = 8000,
    allow_host: Annotated[
        list[str], typer.Option(metavar="NAME", help="Name under which clients reach the server; repeatable.")
    ] = [],  # noqa: B006 (Typer copies it)
    max_batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Sequences computed at a time.")] = 32,
    max_queue_size: Annotated[int, typer.Option(min=0, max=10**6, help="Sequences that may wait.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, max=10**9, help="Tokens that a request may generate.")] = 4096,
    max_body_size: Annotated[int, typer.Option(min=1, max=10**9, help="Bytes of a request.")] = 256 * 1024,
    timeout: Annotated[float, typer.Option(min=0.1, max=MAX_TIMEOUT_S, help="Seconds for a request.")] = 120,
    grace: Annotated[
        float, typer.Option(min=0, max=MAX_TIMEOUT_S, help="Seconds for running requests after SIGTERM.")
    ] = 30,
    watch: Annotated[
        float | None,
        typer.Option(min=0.1, max=MAX_TIMEOUT_S, metavar="SECONDS", help="Look for changed files this often."),
    ] = None,
    log_file: LogFile = LOG_FILE,
) -> None:
    """Name each model after its file."""
    try:
        from gpt.serving.guard import Limits  # noqa: PLC0415 (optional dependencies)
        from gpt.serving.models import FileSource  # noqa: PLC0415
        from gpt.serving.server import ServerOptions, serve  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UserError(f"expected the package {error.name}, found none; pip install 'chargpt[serve]'") from None

    names = [path.stem for path in checkpoint]
    if len(set(names)) < len(names):
        raise UserError(f"--checkpoint: expected files of different names, found {', '.join(names)}; rename one")
    options = ServerOptions(
        host=host,
        port=port,
        allowed_hosts=allow_host,
        max_batch_size=max_batch_size,
        max_queue_size=max_queue_size,
        limits=Limits(max_tokens=max_tokens, max_body_size=max_body_size, timeout_s=timeout),
        watch_s=watch,
        grace_s=grace,
    )
    with logging_to(log_file, "serve"):
        serve([FileSource(path, name) for path, name in zip(checkpoint, names, strict=True)], options)
