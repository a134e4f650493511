"""`python -m stages.evaluate COMMAND…`: run the evaluating command and publish its figures on the checkpoint's row."""

from gpt.files import read_json
from stages import launch
from stages.edits import refusing
from stages.publish import follow_up


def main(command: list[str]) -> int:
    """Evaluate and publish; returns the command's exit code."""
    figures = launch.option(command, "--metrics")
    paths = [figures, *(launch.option(command, name) for name in ("--positions", "--calibration"))]
    return follow_up(
        "evaluate",
        command,
        files={path.name: path for path in paths},
        metrics=lambda: {f"eval_{name}": float(value) for name, value in read_json(figures).items()},
    )


if __name__ == "__main__":
    launch.enter("evaluate", refusing("evaluate", main))
