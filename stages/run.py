"""`python -m stages.run COMMAND…`: run a command that has nothing to publish; dvc's death ends it, dvc names it."""

import os
from pathlib import Path

from stages import launch

STAGE = os.environ.get("DVC_STAGE", "run")


def main(command: list[str]) -> int:
    """Run the command; returns its exit code."""
    return launch.run(command, stage=STAGE, about="", log_file=Path("gpt_nano.log"))


if __name__ == "__main__":
    launch.enter(STAGE, main)
