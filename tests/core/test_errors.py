"""Text from outside on terminals and in logs."""

from pathlib import Path

import pytest

from gpt.core.cli import log, logging_to
from gpt.core.errors import UserError, printable
from gpt.core.files import explain_os_errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("to be\tor\nnot – 要🙂", "to be\tor\nnot – 要🙂"),
        ("\x1b[2J\x07\x00\r\x9b", r"\x1b[2J\x07\x00\r\x9b"),
        ("\u202eabc\ufeff\ud800", r"\u202eabc\ufeff\ud800"),
    ],
)
def test_control_characters_are_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_a_message_cannot_add_lines_to_the_log(tmp_path: Path) -> None:
    with logging_to([tmp_path / "log"], "train"):
        log.info("prompt %s", "a\n2026-01-01 00:00:00 INFO train: forged\x1b[2J")
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 3
    assert lines[1].endswith(r"prompt a\n2026-01-01 00:00:00 INFO train: forged\x1b[2J")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_reported_with_path_and_free_space() -> None:
    full = Path("/dev/full")
    with pytest.raises(UserError, match=r"/dev/full.* free") as error, explain_os_errors(full):
        full.write_text("x")
    assert error.value.exit_code == 2
