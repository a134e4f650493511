"""Draw the pictures of the README from the pipeline's own outputs: `make pictures`."""

from pathlib import Path

from stages.pictures import loss, read_table

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Draw the loss over the steps."""
    plots = ROOT / "plots"
    picture = loss(read_table(plots / "history.csv"), read_table(plots / "validation.csv"))
    (ROOT / "docs" / "loss.png").write_bytes(picture)


if __name__ == "__main__":
    main()
