"""Run folders: the live history, resume states, and the deletion of old folders."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from stages.run_record import HistoryReader, Record, drop_states, is_training, prune, save

MD5 = hashlib.md5(b"weights").hexdigest()


def test_the_history_reader_returns_each_line_once_and_notices_a_truncation(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    reader = HistoryReader(path)

    def lines(*numbers: int, time: int = 1) -> str:
        return "".join(f'{{"step": {n}, "time": {time}, "val_loss": null}}\n' for n in numbers)

    def new_steps() -> list[float]:
        return [point["step"] for point in reader.new_points()]

    assert new_steps() == []
    path.write_text(lines(1, 2) + '{"step": 3, "ti')
    assert (new_steps(), new_steps()) == ([1, 2], [])
    path.write_text(lines(1, 2, 3) + "cut by a power failure\n" + lines(4))
    assert (new_steps(), new_steps()) == ([3, 4], [])
    path.write_text(lines(1))
    assert (new_steps(), new_steps()) == ([1], [])
    path.write_text(lines(1, 2, 3, 4, time=3))  # replaced by a longer one between two calls
    assert new_steps() == [1, 2, 3, 4]


def test_resume_states_are_kept_until_dvc_lock_names_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lock, runs = Path("dvc.lock"), [tmp_path / ".runs" / (digit * 64) for digit in "ab"]
    states = [run / "resume-000000012.pt" for run in runs]
    for run, state in zip(runs, states, strict=True):
        save(run, Record(stage="train", began=5, ended=7, checkpoint="c", checkpoint_md5=MD5), {})
        state.touch()
    for text, time in ((f"md5: {MD5}", 1), ("outs: []", 9), (None, 9)):  # first: of a fresh clone
        lock.write_text(text or "")
        os.utime(lock, (time, time))
        if text is None:
            lock.unlink()
        drop_states(tmp_path)
        assert all(state.exists() for state in states)
    lock.write_text(f"md5: {MD5}")
    with FileLock(runs[1] / "lock"):  # a training is running
        drop_states(tmp_path)
    assert [state.exists() for state in states] == [False, True]
    drop_states(tmp_path)
    assert not states[1].exists()


def test_old_run_folders_are_deleted_except_those_in_use(tmp_path: Path) -> None:
    runs = [tmp_path / ".runs" / (digit * 64) for digit in "abcde"]
    for age, run in enumerate(runs):
        run.mkdir(parents=True)
        os.utime(run, (1000 - age, 1000 - age))
    hold = f"import filelock; lock = filelock.FileLock({str(runs[3] / 'lock')!r}); lock.acquire(); print(); input()"
    holder = subprocess.Popen([sys.executable, "-uc", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout
    holder.stdout.readline()
    os.utime(runs[3], (997, 997))
    try:
        assert (is_training(runs[3]), is_training(runs[0])) == (True, False)
        prune(tmp_path, current=runs[4], keep=1)
    finally:
        holder.communicate(b"\n")
    assert [run.exists() for run in runs] == [True, False, False, True, True]
