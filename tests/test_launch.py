"""Number of training processes, usable GPUs and CPU cores."""

from pathlib import Path
from typing import Literal

import pytest

from gpt import launch
from gpt.core.errors import UserError
from gpt.core.params import check_section
from gpt.launch import LaunchParams, choose_processes, usable_cores, visible_gpus


@pytest.mark.parametrize(
    ("requested", "shards", "gpus", "cores", "processes", "idle"),
    [
        ("auto", 8, 0, 2, 2, ""),
        ("auto", 2, 0, 16, 2, "14 of 16 CPU cores stay idle: train.shards is 2"),
        ("auto", 8, 0, 3, 2, "1 of 3 CPU cores stay idle: their number is not a power of two"),
        ("auto", 8, 4, 64, 4, ""),
        ("auto", 1, 2, 64, 1, "1 of 2 GPUs stay idle: train.shards is 1"),
        ("auto", 4, 0, 1, 1, ""),
        (1, 4, 0, 2, 1, "1 of 2 CPU cores stay idle: launch.processes is 1"),
        (4, 4, 0, 2, 4, ""),
    ],
)
def test_processes(
    requested: Literal["auto"] | int, shards: int, gpus: int, cores: int, processes: int, idle: str
) -> None:
    assert choose_processes(requested, shards=shards, gpus=gpus, cores=cores) == (processes, idle)


def test_more_processes_than_shards_are_refused() -> None:
    with pytest.raises(UserError, match=r"launch.processes: .* train.shards \(2\), found 4"):
        choose_processes(4, shards=2, gpus=0, cores=8)


@pytest.mark.parametrize(
    ("key", "wrong"), [("processes", 3), ("processes", 0), ("processes", "two"), ("processes", 2.5), ("timeout", 0)]
)
def test_an_invalid_section_is_refused(key: str, wrong: object) -> None:
    launch = {"processes": "auto", "timeout": 1}
    check_section(Path("p.yaml"), "launch", LaunchParams, {"launch": launch})
    with pytest.raises(UserError, match=rf"p.yaml: launch.{key}: expected .*, found {wrong!r}"):
        check_section(Path("p.yaml"), "launch", LaunchParams, {"launch": launch | {key: wrong}})


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, 3), ("", 0), ("-1", 0), ("0,1", 2), ("1,-1,0", 1), ("0,1,2,3", 3)]
)
def test_gpus_of_the_driver_limited_by_cuda_visible_devices(
    visible: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(launch, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == expected


@pytest.mark.parametrize(("quota", "limit"), [("100000 100000\n", 1), ("50000 100000\n", 1), ("max 100000\n", None)])
def test_cores_limited_by_the_quota_of_a_container(
    quota: str, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "CGROUP_CPU_MAX", tmp_path / "missing")
    without_quota = usable_cores()
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(launch, "CGROUP_CPU_MAX", tmp_path / "cpu.max")
    assert usable_cores() == (limit or without_quota) >= 1
