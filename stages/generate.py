"""`python -m stages.generate COMMAND…`: run the generating command and publish its text on the checkpoint's row."""

from stages import launch
from stages.edits import refusing
from stages.publish import follow_up


def main(command: list[str]) -> int:
    """Generate and publish; returns the command's exit code."""
    text = launch.option(command, "--out")
    return follow_up("generate", command, files={text.name: text})


if __name__ == "__main__":
    launch.enter("generate", refusing("generate", main))
