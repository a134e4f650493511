"""The live history of a training run, read while the child still appends to it."""

import json
from pathlib import Path

Point = dict[str, float]  # "step", "time" (seconds since 1970) and the figures of that step


class Follower:
    """Reads `history.jsonl` from wherever it stood; copes with a half-written end and with a file that was cut back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._last_line = b""

    def news(self) -> list[Point]:
        """The points of the lines completed since the last call.

        When the line read last no longer stands where it stood, the file was cut back or replaced, and all of it is
        read again: whoever takes the points knows which steps it has.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._last_line))
                if file.read(len(self._last_line)) != self._last_line:
                    self._offset, self._last_line = 0, b""
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        lines = new[: new.rfind(b"\n") + 1].splitlines(keepends=True)
        self._offset += sum(map(len, lines))
        self._last_line = lines[-1] if lines else self._last_line
        return [point for line in lines if (point := _parse(line))]


def _parse(line: bytes) -> Point | None:
    try:
        point = json.loads(line)
        return {name: float(value) for name, value in point.items() if value is not None}
    except (ValueError, TypeError, AttributeError):
        return None  # torn by a power cut; the child cuts such a line off when it continues
