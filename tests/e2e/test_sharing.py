"""Data, models and experiments reach a colleague through a DVC remote and a bare git repository."""

import logging
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import requests
from moto.server import ThreadedMotoServer

from gpt.core.files import sha256_file
from stages.runs.run_record import dvc_cache
from tests.conftest import call_main
from tests.support.clones import CLONES, git, plain, share, shared_cache, write_placeholders
from tests.support.common import STAGES, contents, made_up_text, stage_line
from tests.support.project import CHECKPOINT, OUTPUTS, clone, dvc, experiment_refs, runs, stage


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, dict[str, bytes]]:
    """A bare repository of a project whose outputs are placeholders in a folder as DVC remote; and the outputs."""
    folder = tmp_path_factory.mktemp("shared")
    project = clone(folder / "project", corpus)
    outputs = write_placeholders(project)
    return share(project, str(folder / "storage")), contents(project, outputs)


@pytest.mark.parametrize("kind", CLONES)
def test_a_pull_brings_all_outputs_and_nothing_runs(
    shared: tuple[Path, dict[str, bytes]], tmp_path: Path, kind: str
) -> None:
    origin, outputs = shared
    place = CLONES[kind](origin, tmp_path)
    dvc(place, "pull")
    assert contents(place, outputs) == outputs
    assert executed(dvc(place, "repro").stdout) == []
    assert git(place, "status", "--short") == ""


@pytest.mark.parametrize("link", ["hardlink", "symlink"])
def test_clones_share_the_files_of_a_cache(shared: tuple[Path, dict[str, bytes]], tmp_path: Path, link: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        git(tmp_path, "clone", "--quiet", shared[0], place)
        (place / ".dvc/config.local").write_text(f"[cache]\n    dir = {tmp_path / 'cache'}\n    type = {link}\n")
    dvc(first, "pull")
    dvc(second, "checkout")
    assert (first / CHECKPOINT).samefile(second / CHECKPOINT)
    assert dvc_cache(second) == tmp_path / "cache"
    assert not (second / ".dvc" / "cache").exists()


def executed(output: str) -> list[str]:
    """The stages that dvc ran, not those that it skipped or restored."""
    return [name for name in STAGES if f"Running stage '{name}'" in output]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The address of a local S3 server with the bucket `bucket`; credentials are in the environment."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # not each request
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    requests.put(f"{address}/bucket", timeout=10).raise_for_status()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            patch.setenv(f"AWS_{name}", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield address
    server.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, corpus: Path, bucket: str) -> Path:
    """A clone in which the pipeline has run, with its results in S3 and in a bare git repository."""
    project = clone(tmp_path_factory.mktemp("s3") / "project", corpus, launch__processes=1)
    dvc(project, "repro")
    share(project, "s3://bucket/chargpt", endpointurl=bucket)
    return project


def origin(project: Path) -> Path:
    return project.with_name("origin.git")


@pytest.mark.proof
def test_a_colleague_pulls_from_s3_and_nothing_is_trained(project: Path, tmp_path: Path) -> None:
    colleague = plain(origin(project), tmp_path)
    dvc(colleague, "pull")
    assert contents(colleague, OUTPUTS) == contents(project, OUTPUTS)
    assert executed(dvc(colleague, "repro").stdout) == []
    stage(colleague, "sync")
    assert results(colleague) == results(project)
    assert "remote://storage/files" in stage(colleague, "lineage", "generation_out.txt", "--verify")


@pytest.mark.proof
def test_missing_data_is_pulled_only_for_the_stages_that_run(project: Path, tmp_path: Path) -> None:
    colleague, missing = plain(origin(project), tmp_path), ("--pull", "--allow-missing")
    assert executed(dvc(colleague, "repro", *missing).stdout) == []
    assert not (colleague / CHECKPOINT).exists()
    output = dvc(colleague, "exp", "run", *missing, "-S", "generate.seed=2").stdout
    assert executed(output) == ["generate"]
    assert (colleague / CHECKPOINT).exists()
    assert not (colleague / "data/shakespeare.txt").exists()


@pytest.mark.proof
def test_an_experiment_reaches_a_colleague_with_model_and_metrics(project: Path, tmp_path: Path) -> None:
    dvc(project, "exp", "run", "--temp", "--name", "other", "-S", "train.seed=2")
    dvc(project, "exp", "push", "origin", "other")
    colleague = plain(origin(project), tmp_path)
    dvc(colleague, "exp", "pull", "origin", "other")
    dvc(colleague, "exp", "apply", "other")
    assert executed(dvc(colleague, "repro").stdout) == []
    stage(colleague, "sync")
    assert results(colleague) == results(project, name="other")


@pytest.mark.proof
def test_the_run_cache_restores_the_stages_without_metrics(project: Path, tmp_path: Path) -> None:
    """Metrics are in git, not on the remote: without dvc.lock and metrics from git, their stages run again."""
    dvc(project, "push", "--run-cache")
    colleague = plain(origin(project), tmp_path)
    (colleague / "dvc.lock").unlink()
    assert executed(dvc(colleague, "repro", "--pull").stdout) == ["train", "evaluate"]
    assert contents(colleague, OUTPUTS) == contents(project, OUTPUTS)


@pytest.mark.proof
@pytest.mark.parametrize("kind", [kind for kind in CLONES if kind not in ("plain", "detached")])
def test_an_experiment_runs_in_every_kind_of_clone(project: Path, tmp_path: Path, kind: str) -> None:
    place = CLONES[kind](origin(project), tmp_path)
    dvc(place, "pull")
    where = [] if kind == "shallow" else ["--temp"]  # DVC does not save a temporary experiment of a shallow clone
    output = dvc(place, "exp", "run", *where, "--name", "sampled", "-S", "generate.seed=3").stdout
    assert executed(output) == ["generate"]
    assert "sampled" in experiment_refs(place)
    assert stage(place, "repair") == ""
    stage(place, "sync")
    (only,) = results(place)
    assert only in results(project)
    cache = dvc_cache(place)
    assert cache
    assert (cache / "files").is_dir()
    assert set(place.glob(".dvc/cache")) <= {cache}


@pytest.mark.proof
@pytest.mark.parametrize("link", ["hardlink", "symlink"])
def test_a_command_replaces_links_and_leaves_the_cache(project: Path, tmp_path: Path, link: str) -> None:
    place = shared_cache(origin(project), tmp_path, link)
    dvc(place, "pull")
    text = tmp_path / "text.txt"
    text.write_text(made_up_text(seed=1))
    names = [name for name in OUTPUTS if name != "dvc.lock"]
    outputs, objects = contents(place, names), digests(tmp_path / "cache")
    changes = {"download": f"download.sources=['{text}']", "train": "train.seed=2", "generate": "generate.seed=2"}
    with chdir(place):
        for name in STAGES:
            assert call_main(*stage_line(name, *(["-S", changes[name]] if name in changes else []))) == 0
    assert [name for name, content in contents(place, names).items() if content == outputs[name]] == []
    assert digests(tmp_path / "cache") == objects


def results(project: Path, name: str = "") -> list[tuple[str, dict[str, str], dict[str, float]]]:
    """Run key, params and metrics of all MLflow runs, or of those with a name."""
    kept = {"val/best_loss", "val/bits_per_char", "train/parameters"}
    return [
        (found.data.tags["run.key"], found.data.params, {k: v for k, v in found.data.metrics.items() if k in kept})
        for found in runs(project)
        if not name or found.info.run_name == name
    ]


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder."""
    return {str(path): sha256_file(path) for path in folder.rglob("*") if path.is_file()}
