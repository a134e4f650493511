"""`python -m stages.generate COMMAND…`: run the generation and publish its text on the run of the checkpoint."""

from stages.execution.command_line import enter
from stages.execution.stage import CheckpointStage


class Generate(CheckpointStage):
    """The stage generate."""

    name, outputs = "generate", ("--out",)


if __name__ == "__main__":
    enter("generate", Generate.main)
