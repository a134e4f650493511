"""`python -m stages.generate COMMAND…`: run the generation and publish its text on the run of the checkpoint."""

from collections.abc import Sequence

from stages.checkpoint_stage import run_and_publish
from stages.child import enter
from stages.command_line import CommandLine
from stages.stage_inputs import refuse_edited_inputs


def main(words: Sequence[str]) -> int:
    """Generate and publish; returns the command's exit code."""
    command = CommandLine(words)
    return run_and_publish("generate", command, files=[command.path("--out")])


if __name__ == "__main__":
    enter("generate", refuse_edited_inputs("generate", main))
