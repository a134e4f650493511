"""`python -m stages.evaluate COMMAND…`: run the evaluating command and publish its figures on the checkpoint's row."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from gpt.core.files import read_json
from stages import launch
from stages.edits import refusing
from stages.publish import follow_up


def main(command: list[str]) -> int:
    """Evaluate and publish; returns the command's exit code."""
    with tempfile.TemporaryDirectory() as drawn:  # what is published is kept in the run folder
        return _evaluate(launch.with_option(command, "--pictures", drawn))


def _evaluate(command: list[str]) -> int:
    figures, positions = launch.option(command, "--metrics"), launch.option(command, "--positions")
    calibration = next((Path(path) for path in launch.options(command, "--calibration")), None)
    return follow_up(
        "evaluate",
        command,
        files={path.name: path for path in (figures, positions, calibration) if path},
        metrics=lambda: {f"eval_{name}": float(value) for name, value in read_json(figures).items()},
        pictures=lambda: _pictures(positions, calibration, launch.option(command, "--pictures")),
    )


def _pictures(positions: Path, calibration: Path | None, drawn: Path) -> Iterable[tuple[str, bytes]]:
    from stages.pictures import of_evaluation  # noqa: PLC0415 (half a second, spent while the command ran)

    return of_evaluation(positions, calibration, drawn)


if __name__ == "__main__":
    launch.enter("evaluate", refusing("evaluate", main))
