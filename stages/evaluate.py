"""`python -m stages.evaluate COMMAND…`: run the evaluation and publish its metrics on the run of the checkpoint."""

from pathlib import Path

from gpt.core.files import read_json
from stages.execution.command_line import CommandLine, enter
from stages.execution.stage import CheckpointStage


class Evaluate(CheckpointStage):
    """The stage evaluate: also publishes metrics and plots."""

    name = "evaluate"
    outputs = ("--metrics", "--positions", "--blocks", "--calibration")

    def __init__(self, command: CommandLine, temporary: Path) -> None:
        """Let the command write its plots into the temporary folder."""
        super().__init__(command.with_default("--pictures", temporary / "plots"), temporary)

    def metrics(self) -> dict[str, float]:
        """The metrics of the command."""
        return {name: float(value) for name, value in read_json(self.command.path("--metrics")).items()}

    def artifacts(self) -> dict[str, Path | str]:
        """Also the plots of the command."""
        plots = self.command.path("--pictures").glob("*.png")
        return super().artifacts() | {f"pictures/{path.name}": path for path in plots}


if __name__ == "__main__":
    enter("evaluate", Evaluate.main)
