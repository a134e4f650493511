"""`python -m stages.evaluate COMMAND…`: run the evaluation and publish its metrics on the run of the checkpoint."""

import tempfile
from collections.abc import Iterable, Sequence

from gpt.core.files import read_json
from stages.checkpoint_stage import run_and_publish
from stages.child import enter
from stages.command_line import CommandLine
from stages.stage_inputs import refuse_edited_inputs


def main(words: Sequence[str]) -> int:
    """Evaluate and publish; returns the command's exit code."""
    with tempfile.TemporaryDirectory() as folder:  # the plots are copied into the run folder
        return _evaluate(CommandLine(words).with_default("--pictures", folder))


def _evaluate(command: CommandLine) -> int:
    metrics, positions = command.path("--metrics"), command.path("--positions")
    calibration, model_plots = command.optional_path("--calibration"), command.path("--pictures")

    def plots() -> Iterable[tuple[str, bytes]]:
        from stages.run_plots import of_evaluation  # noqa: PLC0415 (imports matplotlib)

        return of_evaluation(positions, calibration, model_plots)

    return run_and_publish(
        "evaluate",
        command,
        files=[path for path in (metrics, positions, calibration) if path],
        metrics=lambda: {f"eval_{name}": float(value) for name, value in read_json(metrics).items()},
        plots=plots,
    )


if __name__ == "__main__":
    enter("evaluate", refuse_edited_inputs("evaluate", main))
