"""Parts of a benchmark with a common deadline: each runs in its own process, and its results are kept if it is ended.

A process of its own, because an error of the GPU makes all later calls in the same process fail.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.core.errors import OneLineError
from gpt.core.files import read_json, write_json

CONTEXT = multiprocessing.get_context("forkserver")  # torch is imported once, and no process inherits a CUDA context
OK, FAILED, ENDED, NOT_RUN = "ok", "failed", "ended at its limit", "not run"

Results = dict[str, Any]
Task = Callable[[], Results]


@dataclass(frozen=True)
class Setup:
    """What the tasks of a part are told.

    `limit_s` is the time for the part; `earlier` holds the results of the parts before it, by part and task.
    """

    tokens: Path
    device: str
    tiny: bool
    limit_s: float = 0.0
    earlier: Mapping[str, Mapping[str, Results]] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Named tasks, run one after the other; the share of the deadline is in proportion to `weight`.

    The part is not started with less than `least_s` seconds. A task returns its results; with the key "ended" they are
    those of a task that its limit ended.
    """

    name: str
    weight: float
    least_s: float
    tasks: Callable[[Setup], Mapping[str, Task]]


def run_parts(parts: Sequence[Part], setup: Setup, deadline_s: float, folder: Path) -> Iterator[tuple[str, Results]]:
    """Run the parts in order; yields the report of each. Time that a part does not need goes to the later ones.

    Args:
        folder: for the results of the running part.
    """
    earlier: dict[str, Mapping[str, Results]] = {}
    until = time.monotonic() + deadline_s
    for index, part in enumerate(parts):
        weights = [later.weight for later in parts[index:]]
        limit = (until - time.monotonic()) * weights[0] / sum(weights)
        if limit < part.least_s:
            yield part.name, {"status": NOT_RUN, "seconds": 0, "results": {}}
            continue
        told = Setup(setup.tokens, setup.device, setup.tiny, limit, earlier)
        report = run_part(part, told, folder / f"{part.name}.json")
        earlier[part.name] = report["results"]
        yield part.name, report


def run_part(part: Part, setup: Setup, path: Path) -> Results:
    """Run a part in a process of its own, and end it and its children at the limit.

    Returns:
        `status`, `seconds`, and `results` by task; a task that failed has the key "error".
    """
    began = time.monotonic()
    process = CONTEXT.Process(target=_work, args=(part, setup, path))
    process.start()
    process.join(setup.limit_s)
    at_limit = process.is_alive()
    if at_limit and process.pid:
        with suppress(ProcessLookupError):  # not yet the leader of its group
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    results = read_json(path) if path.exists() else {}
    return {
        "status": _status(results, None if at_limit else process.exitcode),
        "seconds": round(time.monotonic() - began, 1),
        "results": results,
    }


def _status(results: Results, code: int | None) -> str:
    """The status of a part; `code` is its exit code, None if its limit ended it."""
    found = [task for task in results.values() if isinstance(task, dict)]
    if code not in (None, 0) or any("error" in task for task in found):
        return FAILED
    return ENDED if code is None or any("ended" in task for task in found) else OK


def _work(part: Part, setup: Setup, path: Path) -> None:
    """Run the tasks and write the results after each; a task that fails does not keep the next from running."""
    os.setsid()
    tasks = part.tasks(setup)
    results: Results = dict.fromkeys(tasks, NOT_RUN)
    write_json(path, results)
    for name, task in tasks.items():
        try:
            results[name] = task()
        except Exception as error:  # whatever the GPU's libraries raise
            cause = str(error) if isinstance(error, OneLineError) else f"{type(error).__name__}: {error}"
            results[name] = {"error": cause}
        write_json(path, results)
