"""`python -m stages.evaluate COMMAND…`: run the evaluation and publish its metrics on the run of the checkpoint."""

from collections.abc import Iterator
from pathlib import Path

from gpt.core.files import read_json
from stages.command_line import CommandLine
from stages.entry import enter
from stages.stage import CheckpointStage


class Evaluate(CheckpointStage):
    """The stage evaluate: also publishes metrics and plots."""

    name, sections = "evaluate", ("evaluate",)
    outputs, optional_outputs = ("--metrics", "--positions"), ("--calibration",)
    has_plots = True

    def __init__(self, command: CommandLine, temporary: Path) -> None:
        """Let the command write its plots into the temporary folder."""
        super().__init__(command.with_default("--pictures", temporary / "plots"), temporary)

    def metrics(self) -> dict[str, float]:
        """The metrics of the command with a prefix."""
        found = read_json(self.command.path("--metrics"))
        return {f"eval_{name}": float(value) for name, value in found.items()}

    def plots(self) -> Iterator[tuple[str, bytes]]:
        """The plots of the command, and those of its tables."""
        from stages.run_plots import of_evaluation  # noqa: PLC0415 (imports matplotlib)

        paths = self.command.path("--positions"), self.command.optional_path("--calibration")
        yield from of_evaluation(*paths, self.command.path("--pictures"))


if __name__ == "__main__":
    enter("evaluate", Evaluate.main)
