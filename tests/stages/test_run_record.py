"""Run folders: the live history, resume states, and the deletion of old folders."""

import hashlib
import os
from pathlib import Path

import pytest

from stages.runs.run_record import HistoryReader, Record, drop_states, lock, prune, save

MD5 = hashlib.md5(b"weights").hexdigest()


def test_the_history_reader_returns_each_complete_line_once(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    reader = HistoryReader(path)

    def lines(*numbers: int) -> str:
        return "".join(f'{{"step": {n}, "time": 1, "val/loss": null}}\n' for n in numbers)

    def new_steps() -> list[float]:
        return [point["step"] for point in reader.new_points()]

    assert new_steps() == []
    path.write_text(lines(1, 2) + '{"step": 3, "ti')
    assert (new_steps(), new_steps()) == ([1, 2], [])
    path.write_text(lines(1, 2, 3) + "cut by a power failure\n" + lines(4))
    assert (new_steps(), new_steps()) == ([3, 4], [])


def test_resume_states_are_kept_until_dvc_lock_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, runs = Path("dvc.lock"), [tmp_path / ".runs" / (digit * 64) for digit in "ab"]
    states = [run / "resume-000000012.pt" for run in runs]
    for run, state in zip(runs, states, strict=True):
        save(run, Record(stage="train", began=5, ended=7, checkpoint="c", checkpoint_md5=MD5), {})
        state.touch()
    for text, time in ((f"md5: {MD5}", 1), ("outs: []", 9), (None, 9)):  # first: of a fresh clone
        file.write_text(text or "")
        os.utime(file, (time, time))
        if text is None:
            file.unlink()
        drop_states(tmp_path)
        assert all(state.exists() for state in states)
    file.write_text(f"md5: {MD5}")
    with lock(runs[1]):  # a wrapper is at work
        drop_states(tmp_path)
    assert [state.exists() for state in states] == [False, True]
    drop_states(tmp_path)
    assert not states[1].exists()


def test_old_run_folders_are_deleted_except_those_in_use(tmp_path: Path) -> None:
    runs = [tmp_path / ".runs" / (digit * 64) for digit in "abcde"]
    for age, run in enumerate(runs):
        run.mkdir(parents=True)
        os.utime(run, (1000 - age, 1000 - age))
    with lock(runs[3]):
        os.utime(runs[3], (997, 997))
        prune(tmp_path, current=runs[4], keep=1)
    assert [run.exists() for run in runs] == [True, False, False, True, True]
