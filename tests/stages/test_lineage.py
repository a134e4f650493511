"""`python -m stages.lineage`: chains from texts, checkpoints, metrics, runs and models, found by content."""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from gpt.core.errors import UserError
from gpt.core.files import read_json, sha256_file
from gpt.core.params import read_params
from stages import sync
from stages.execution.command_line import enter
from stages.lineage import main
from stages.release.lineage_places import content_of
from stages.runs.publish import connect
from stages.runs.run_record import COMMIT, DIRTY, Record, flatten, save
from stages.tracking.registry import Registry
from tests.conftest import call_main
from tests.support.common import FAST, STAGES, environment, free_port, only_line, run, stage_line, write_params
from tests.support.project import CHECKPOINT, clone, dvc, runs

TEXT, TOKENS, CORPUS, METRICS = "generation_out.txt", "data/tokens", "data/shakespeare.txt", "metrics/train.json"
KEY = "a1b2c3d4" * 8
CHAIN = ["text", "checkpoint", "run", "params", "code", "tokens", "corpus", "source"]
Chain = dict[str, dict[str, Any]]
Trace = Callable[..., Chain]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokens: Path, trained: Path, empty_store: Path
) -> Path:
    """A project with the outputs of a training and a generation in DVC, git, a run folder and MLflow."""
    project = tmp_path_factory.mktemp("lineage") / "project"
    shutil.copytree(tokens, project / TOKENS)
    shutil.copy(corpus, project / CORPUS)
    for folder in ("metrics", "plots"):
        (project / folder).mkdir()
        for path in trained.glob(f"{folder}/*"):
            shutil.copy(path, project / folder)
    shutil.copy(trained / "model.pt", project / CHECKPOINT)
    sources = {
        "download__sources": [str(corpus), "https://user:secret@host/text"],
        "download__sha256": sha256_file(corpus),
    }
    text = {"generate__max_new_tokens": 9, "generate__prompts": ["the "]}
    write_params(project / "params.yaml", **FAST, **sources, **text, train__max_steps=20, model__dropout=0.0)
    with chdir(project), pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
            patch.delenv(name, raising=False)
        assert call_main(*stage_line("generate")) == 0
        record_in_dvc()
        record_run(project / ".runs" / KEY)
        shutil.copyfile(empty_store, "mlflow.db")
        assert sync.main([]) == 0
        registry = Registry(connect(project, "chargpt"))
        version = registry.register(registry.model(runs(project)[0].info.run_id)).version
        registry.client.set_registered_model_alias("chargpt", "champion", version)
    return project


def record_in_dvc() -> None:
    """Commit the outputs in the current folder to DVC and git, with the stages of this project but without code."""
    kept = {name: stage for name, stage in STAGES.items() if name != "evaluate"}
    stages = {name: {**s, "deps": [dep for dep in s["deps"] if not dep.startswith("gpt/")]} for name, s in kept.items()}
    YAML(typ="safe", pure=True).dump({"stages": stages}, Path("dvc.yaml"))
    Path(".gitignore").write_text("mlflow.db*\nmlruns/\n.runs/\ngpt_nano.log\n")
    run(["git", "init", "--quiet"], Path.cwd())
    Repo.init().commit(force=True)
    run(["git", "add", "--all"], Path.cwd())
    run(["git", "commit", "--quiet", "--message", "a model"], Path.cwd())


def record_run(folder: Path) -> None:
    """Write the run folder that the wrappers of training and generation would write."""
    checkpoint = content_of(Path(CHECKPOINT))
    assert checkpoint
    hashes: dict[str, Any] = {
        "checkpoint": checkpoint.sha256,
        "checkpoint_md5": checkpoint.md5,
        "checkpoint_file": CHECKPOINT,
    }
    commit = run(["git", "rev-parse", "HEAD"], Path.cwd()).stdout.strip()
    tags = {"run.key": KEY, "checkpoint.sha256": checkpoint.sha256, COMMIT: commit, DIRTY: "gpt/api.py"}
    params = flatten(read_params(Path("params.yaml")), ("download", "tokenize", "model", "train"))
    params["download.sources"] = params["download.sources"].replace("user:secret@", "")
    about: dict[str, Any] = {"tags": tags, "params": params, "dataset": read_json(Path(TOKENS, "meta.json"))}
    train = Record(stage="train", name="wise-owl", began=1, ended=2, **hashes, **about)
    save(folder, train, {"params.yaml": Path("params.yaml"), "train.json": Path(METRICS)})
    generate = Record(stage="generate", began=3, ended=4, tags={"checkpoint.sha256": checkpoint.sha256})
    save(folder, generate, {TEXT: Path(TEXT)})


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the finished project, restored after the test where that changed it."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(finished)
    return finished


@pytest.fixture
def trace(capsys: pytest.CaptureFixture[str]) -> Trace:
    """The items of a chain by kind; also their problems as `problems`."""

    def invoke(*arguments: str | Path, code: int = 0) -> Chain:
        capsys.readouterr()
        assert main([*map(str, arguments), "--json"]) == code
        return parsed(capsys.readouterr().out)

    return invoke


def parsed(output: str) -> Chain:
    """The items of a chain in JSON by kind."""
    item = top = json.loads(output)
    found: Chain = {"problems": {"all": top["all_problems"]}}
    pending = [top]
    while pending:
        item = pending.pop(0)
        found[item["kind"]] = item
        pending += item["origins"]
    return found


def where(item: dict[str, Any]) -> dict[str, str]:
    """The places of an item with their states."""
    return {place["where"]: place["state"] for place in item["places"]}


def test_a_text_leads_to_its_source_with_every_hash_and_place(project: Path, trace: Trace, corpus: Path) -> None:
    chain = trace(TEXT, "--verify")
    assert set(chain) == {*CHAIN, "problems"}
    files = {"text": TEXT, "checkpoint": CHECKPOINT, "params": "params.yaml", "corpus": CORPUS, "source": CORPUS}
    assert {kind: chain[kind]["sha256"] for kind in files} == {k: sha256_file(Path(v)) for k, v in files.items()}
    assert chain["tokens"]["files"] == {path.name: sha256_file(path) for path in Path(TOKENS).iterdir()}
    expected = {
        "text": {"workspace", "DVC cache", "run folder", "MLflow"},
        "checkpoint": {"workspace", "DVC cache", "MLflow"},
        "params": {"workspace", "run folder", "MLflow"},
        "tokens": {"workspace", "DVC cache"},
        "corpus": {"workspace", "DVC cache"},
    }
    assert {kind: where(chain[kind]) for kind in expected} == {
        kind: dict.fromkeys(places, "verified") for kind, places in expected.items()
    }
    assert chain["run"]["details"]["key"] == KEY
    assert "chargpt version 1 (champion)" in chain["run"]["details"]["registered"]
    assert run(["git", "rev-parse", "HEAD"], project).stdout.strip() in chain["code"]["name"]
    assert chain["code"]["details"]["uncommitted"] == "gpt/api.py"
    states = [(place["address"], place["state"]) for place in chain["source"]["places"]]
    assert states == [(str(corpus), "verified"), ("https://host/text", "not fetched")]


@pytest.mark.parametrize("subject", ["copy", METRICS, KEY[:8], "run id", "models:/chargpt@champion"])
def test_all_ways_lead_to_the_same_checkpoint(project: Path, trace: Trace, tmp_path: Path, subject: str) -> None:
    if subject == "copy":
        subject = str(shutil.copy(CHECKPOINT, tmp_path / "renamed.pt"))
    elif subject == "run id":
        subject = runs(project)[0].info.run_id
    chain = trace(subject)
    assert set(CHAIN[1:]) <= set(chain)
    assert chain["checkpoint"]["sha256"] == sha256_file(Path(CHECKPOINT))
    assert chain["corpus"]["sha256"] == sha256_file(Path(CORPUS))
    assert where(chain["checkpoint"])["MLflow"] == "present"
    if subject.endswith("renamed.pt"):
        assert chain["checkpoint"]["places"][0] == {
            "where": "file",
            "address": subject,
            "state": "verified",
            "note": "",
        }


def test_tokens_lead_to_the_source_without_its_password(project: Path, trace: Trace) -> None:
    chain = trace(TOKENS, "--verify")
    assert [place["address"] for place in chain["source"]["places"]][1:] == ["https://host/text"]
    assert chain["corpus"]["sha256"] == sha256_file(Path(CORPUS))


def test_a_store_that_fails_is_named_and_the_rest_is_shown_without_control_characters(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port()}")
    assert main([str(shutil.copy(TEXT, tmp_path / "a\x1b[2J\n.txt"))]) == 0
    output = capsys.readouterr().out
    lines = [line.strip(" │├└─").split("  ")[0] for line in output.splitlines()]
    assert [line for line in lines if line in CHAIN] == CHAIN
    assert f"SHA-256      {sha256_file(Path(CORPUS))}" in output
    assert "MLflow was not searched: http://127.0.0.1:" in output
    assert "secret" not in output
    assert "\\x1b[2J\\n.txt" in output


def test_verify_names_what_differs_and_what_is_missing(project: Path, trace: Trace) -> None:
    """One byte of the tokens and of the cached checkpoint differs; the cache has lost the text and some tokens."""
    objects = []
    for path in (CHECKPOINT, TEXT, f"{TOKENS}/val.bin"):
        content = content_of(Path(path))
        assert content
        objects.append(Path(".dvc/cache/files/md5", content.md5[:2], content.md5[2:]))
    files = [Path(TOKENS, "train.bin"), *objects]
    before = [path.read_bytes() for path in files]
    for file, data in zip(files, before, strict=True):
        file.unlink()  # it may be read-only, or a link
        if file in files[:2]:
            file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    try:
        problems = trace(TEXT, "--verify", code=1)["problems"]["all"]
    finally:
        for file, data in zip(files, before, strict=True):
            file.write_bytes(data)
    assert len(problems) == 4
    for start, end in (
        (f"text {TEXT}: DVC cache {objects[1]}", "missing"),
        (f"checkpoint {CHECKPOINT}: DVC cache {objects[0]}", "different"),
        (f"tokens {TOKENS}: workspace", "different train.bin"),
        (f"tokens {TOKENS}: DVC cache", "different val.bin"),
    ):
        assert [line for line in problems if line.startswith(start) and line.strip().endswith(end)], (start, problems)


def test_a_changed_output_is_not_taken_for_the_recorded_one(project: Path, trace: Trace) -> None:
    """The text still names its checkpoint."""
    kept = Path(TEXT).read_bytes()
    Path(TEXT).write_bytes(kept + b" ")
    try:
        chain = trace(TEXT, "--verify", code=1)
    finally:
        Path(TEXT).write_bytes(kept)
    assert chain["checkpoint"]["sha256"] == sha256_file(Path(CHECKPOINT))
    assert [TEXT in problem for problem in chain["problems"]["all"]] == [True]


def test_unknown_content_is_one_line_and_exit_code_2_and_creates_no_store(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(shutil.copy(CHECKPOINT, tmp_path / "a\x1b[2J.pt"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lineage", str(file)])
    with pytest.raises(SystemExit, match="2"):
        enter("lineage", main)
    line = only_line(capsys.readouterr().err)
    assert sha256_file(file) in line
    assert "\x1b" not in line
    with pytest.raises(UserError, match="MLflow store"):
        main(["models:/chargpt@champion"])
    assert not Path("mlflow.db").exists()


@pytest.mark.proof
def test_a_clone_traces_what_it_pulled(tmp_path: Path, corpus: Path) -> None:
    """The real pipeline, twice with other seeds; then a clone with neither run folder nor store, before its sync."""
    project, copy = clone(tmp_path / "project", corpus), tmp_path / "copy"

    def traced(folder: Path, subject: str | Path, *options: str, code: int = 0) -> Chain:
        command = [sys.executable, "-m", "stages.lineage", subject, "--json", *options]
        return parsed(run(command, folder, code=code, env=environment(PYTHONPATH="")).stdout)

    dvc(project, "remote", "add", "--default", "store", str(tmp_path / "remote"))
    dvc(project, "repro")
    run([sys.executable, "-m", "stages.sync"], project, env=environment(PYTHONPATH=""))
    early = Path(shutil.copy(project / TEXT, tmp_path / "early.txt"))
    dvc(project, "push")
    one = traced(project, TEXT, "--verify")
    assert where(one["tokens"])["DVC remote"] == "verified"
    dvc(project, "exp", "run", "-S", "train.seed=5")
    run(["git", "add", "--all"], project)
    run(["git", "commit", "--quiet", "--message", "two"], project)
    dvc(project, "push")
    again, two = traced(project, early, "--verify"), traced(project, "metrics/evaluate.json", "--verify")
    assert again["checkpoint"]["sha256"] == one["checkpoint"]["sha256"] != two["checkpoint"]["sha256"]
    assert again["tokens"]["md5"] == one["tokens"]["md5"]
    assert one["params"]["sha256"] != two["params"]["sha256"]
    assert two["run"]["details"]["experiment"]
    run(["git", "clone", "--quiet", project, copy], tmp_path)
    dvc(copy, "pull")
    assert "stages.sync" in traced(copy, TEXT, "--verify", code=1)["problems"]["all"][0]
    run([sys.executable, "-m", "stages.sync"], copy, env=environment(PYTHONPATH=""))
    assert traced(copy, CHECKPOINT, "--verify")["corpus"]["sha256"] == sha256_file(corpus)
