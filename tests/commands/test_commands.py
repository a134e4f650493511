"""The commands as a user runs them: their outputs, and the error messages."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt.__main__ import main
from gpt.model.checkpoint import load_checkpoint
from gpt.model.device import slow_in_bfloat16
from tests.conftest import RunGpt
from tests.support.common import ROOT, environment, only_line, write_params


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    """A folder with the outputs of a short training."""
    folder = tmp_path_factory.mktemp("trained")
    write_params(folder / "params.yaml", train__max_steps=20, model__dropout=0.0)
    done = subprocess.run(
        [sys.executable, "-m", "gpt", *train_line(tokens)],
        cwd=folder,
        env=environment(),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 20/20" in done.stdout
    return folder


def train_line(tokens: Path, *more: str) -> list[str]:
    outputs = ["--checkpoint", "model.pt", "--metrics", "metrics/train.json", "--history", "plots/history.csv"]
    outputs += ["--validation", "plots/validation.csv"]
    return ["train", "--params", "params.yaml", "--tokens", str(tokens), *outputs, *more]


def evaluate_line(trained: Path, tokens: str | Path, params: Path) -> list[str | Path]:
    outputs = ["--metrics", "evaluate.json", "--positions", "positions.csv", "--calibration", "calibration.csv"]
    return ["evaluate", "--params", params, "--tokens", tokens, "--checkpoint", trained / "model.pt", *outputs]


def test_a_warning_on_a_cpu_without_bfloat16(tokens: Path, tmp_path: Path) -> None:
    """ONEDNN_MAX_CPU_ISA makes torch see an older CPU."""
    write_params(tmp_path / "params.yaml", train__max_steps=1)
    for instructions, warned in (("AVX2", True), ("ALL", slow_in_bfloat16(torch.device("cpu")))):
        done = subprocess.run(
            [sys.executable, "-m", "gpt", *train_line(tokens)],
            cwd=tmp_path,
            env=environment(ONEDNN_MAX_CPU_ISA=instructions),
            text=True,
            capture_output=True,
            check=True,
        )
        assert ("float32 will be faster" in done.stdout) == warned


def test_train_writes_its_outputs_and_no_other_files(trained: Path) -> None:
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    tables = {"plots/history.csv", "plots/validation.csv"}
    assert files == tables | {"params.yaml", "model.pt", "metrics/train.json", "gpt_nano.log"}
    metrics = json.loads((trained / "metrics" / "train.json").read_text())
    about = load_checkpoint(trained / "model.pt").about
    assert list(metrics) == ["train_loss", "val_loss", "best_step", "parameters"]
    assert (metrics["best_step"], metrics["val_loss"]) == (about["step"], round(about["val_loss"], 4))
    header, *rows = (trained / "plots" / "history.csv").read_text().splitlines()
    assert header == "step,train_loss,learning_rate,grad_norm"
    assert [row.split(",")[0] for row in rows] == ["10", "20"]
    header, *rows = (trained / "plots" / "validation.csv").read_text().splitlines()
    assert (header, [row.split(",")[0] for row in rows]) == ("step,val_loss", ["20"])


def test_evaluate_reproduces_the_validation_loss_of_training(
    gpt: RunGpt, trained: Path, tokens: Path, tmp_path: Path
) -> None:
    done = gpt(*evaluate_line(trained, tokens, trained / "params.yaml"), "--pictures", "pictures")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        "attention.png",
        "positions.png",
        "embeddings.png",
    }
    metrics = json.loads((tmp_path / "evaluate.json").read_text())
    val_loss = load_checkpoint(trained / "model.pt").about["val_loss"]
    assert list(metrics) == ["bits_per_char", "calibration_error", "longest_copy", "copied"]
    assert metrics["bits_per_char"] == pytest.approx(val_loss / math.log(2), abs=0.001)
    assert f"loss {val_loss:.4f} nats" in done.stdout
    assert len((tmp_path / "positions.csv").read_text().splitlines()) == 1 + 32
    header, *rows = (tmp_path / "calibration.csv").read_text().splitlines()
    assert header == "probability,right,ideal,predictions"
    assert 1 < len(rows) <= 10


def test_generate_prints_the_same_text_for_the_same_seed(gpt: RunGpt, trained: Path) -> None:
    line = ["generate", "--checkpoint", trained / "model.pt", "--prompt", "the ", "--max-new-tokens", "40"]
    first, again = gpt(*line, "--seed", "1"), gpt(*line, "--seed", "1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("the ")
    assert len(first.stdout) == len("the ") + 40 + len("\n")
    assert first.stdout == again.stdout


def test_a_samples_file_contains_the_digests_of_checkpoint_and_corpus(
    gpt: RunGpt, trained: Path, tmp_path: Path
) -> None:
    line = ["generate", "--checkpoint", trained / "model.pt", "--params", trained / "params.yaml", "--prompt", ""]
    done = gpt(*line, "--out", "a/text.txt", "-S", "generate.samples=2")
    assert done.returncode == 0, done.stderr
    document = (tmp_path / "a" / "text.txt").read_text()
    digest = subprocess.run(["sha256sum", trained / "model.pt"], text=True, capture_output=True, check=True).stdout
    assert digest.split()[0] in document
    assert str(load_checkpoint(trained / "model.pt").about["corpus_sha256"]) in document
    assert "prompt '', sample 2 of 2" in document


def test_generate_options_prompt_file_stop_and_no_cache(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompt.txt"
    prompts.write_bytes(b"the quick\nbrown ")
    monkeypatch.chdir(tmp_path)

    def generated(*more: str) -> str:
        line = ["gpt", "generate", "--checkpoint", str(trained / "model.pt"), "--prompt-file", str(prompts)]
        monkeypatch.setattr(sys, "argv", [*line, "--max-new-tokens", "80", "--top-p", "0.9", *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    text = generated("--samples", "3")
    assert text == generated("--samples", "3", "--no-cache")
    assert text.count("the quick\nbrown ") == 3
    whole = generated()
    ended = generated("--stop", "zzz", "--stop", " ")
    assert whole.startswith(ended.rstrip("\n") + " ")
    assert " " not in ended.removeprefix("the quick\nbrown ")
    for option, value in (("--top-p", "0"), ("--repetition-penalty", "0"), ("--stop", "")):
        line = ["gpt", "generate", "--checkpoint", str(trained / "model.pt"), option, value]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit, match="2"):
            main()
        assert f"generate.{option[2:].replace('-', '_')}" in only_line(capsys.readouterr().err)
    prompts.write_bytes(b"\xff")
    monkeypatch.setattr(sys, "argv", ["gpt", "generate", "--checkpoint", "x", "--prompt-file", str(prompts)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "expected UTF-8, found invalid start byte at byte 0" in only_line(capsys.readouterr().err)


def test_a_closed_pipe_is_not_an_error(trained: Path, tmp_path: Path) -> None:
    line = f"'{sys.executable}' -m gpt generate --checkpoint '{trained / 'model.pt'}' --prompt 'the ' | head -c 3"
    done = subprocess.run(
        line, shell=True, cwd=tmp_path, env=environment(), text=True, capture_output=True, check=False
    )
    assert done.stdout == "the"
    assert done.stderr == ""


MISTAKES = {
    "unknown verb": (["trian"], ["'trian'", "Did you mean 'train'? Try: "]),
    "unknown option": (["train", "--tokenz", "x"], ["--tokenz"]),
    "missing option": (["train", "--params", "params.yaml"], ["--tokens"]),
    "no params file": (["tokenize", "--params", "none.yaml", "--corpus", "x", "--out", "y"], ["none.yaml"]),
    "no tokens": (train_line(Path("nowhere")), ["nowhere/meta.json", "run the stage"]),
    "no GPU": (train_line(Path("TOKENS"), "-S", "train.device=cuda"), ["train.device", "cuda", "auto"]),
    "long block": (
        train_line(Path("TOKENS"), "-S", "model.block_size=535"),
        ["too short", "2,140", "model.block_size 535"],
    ),
    "prompt of other characters": (
        ["generate", "--checkpoint", "MODEL", "--prompt", "Zé the"],
        ["prompt 'Zé the'", "'Z', 'é'", "generate.prompts", "--prompt"],
    ),
    "no checkpoint": (["generate", "--checkpoint", "none.pt"], ["none.pt", "No such file"]),
    "negative temperature": (
        ["generate", "--checkpoint", "MODEL", "--temperature", "-1"],
        ["--temperature", "greater than or equal to 0"],
    ),
    "output folder is a file": (
        train_line(Path("TOKENS"), "--run-dir", "params.yaml/x"),
        ["params.yaml/x", "Not a directory"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_user_error_is_one_line_and_exit_code_2(
    name: str,
    trained: Path,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`main` in this process: a new one spends two seconds on importing torch."""
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments, expected = MISTAKES[name]
    write_params(tmp_path / "params.yaml")
    paths = {"MODEL": str(trained / "model.pt"), "TOKENS": str(tokens)}
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpt", *(paths.get(argument, argument) for argument in arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    line = only_line(capsys.readouterr().err)
    for part in expected:
        assert part in line
    assert [path for path in sorted(tmp_path.rglob("*")) if path.suffix in (".pt", ".json", ".csv")] == []
    assert set(tmp_path.rglob("*")) - set(before) <= {
        tmp_path / "gpt_nano.log",
        tmp_path / "metrics",
        tmp_path / "plots",
    }


def test_an_error_message_is_one_write(tmp_path: Path) -> None:
    """Several ranks write into one pipe; here one read returns what one write wrote."""
    reader, writer = os.pipe2(os.O_DIRECT)
    line = [sys.executable, "-m", "gpt", "download", "--params", "none.yaml", "--out", "x"]
    subprocess.run(line, cwd=tmp_path, env=environment(PYTHONUNBUFFERED="1"), stderr=writer, check=False)
    os.close(writer)
    message = os.read(reader, 4096)
    os.close(reader)
    assert message.startswith(b"gpt download: none.yaml")
    assert message.endswith(b"\n")


def test_log_file_is_repeatable(gpt: RunGpt, tmp_path: Path) -> None:
    """Both files contain the error; the default log file is not written."""
    line = ["download", "--params", "none.yaml", "--out", "x"]
    assert gpt(*line, "--log-file", "a/one.log", "--log-file", "two.log").returncode == 2
    assert "download: ended" in (tmp_path / "a" / "one.log").read_text()
    assert (tmp_path / "a" / "one.log").read_text() == (tmp_path / "two.log").read_text()
    assert not (tmp_path / "gpt_nano.log").exists()


def test_without_arguments_help_is_printed_and_version_is_an_option(gpt: RunGpt) -> None:
    done = gpt()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == gpt("--help").stdout
    assert gpt("--version").stdout.startswith("chargpt ")


@pytest.mark.parametrize(("typed", "expected"), [("chargpt tok", "tokenize"), ("chargpt check-params --s", "--set")])
def test_shell_completion_of_the_console_script(tmp_path: Path, typed: str, expected: str) -> None:
    script = tmp_path / "chargpt"
    script.write_text("from gpt.__main__ import main\nmain()\n")
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_CHARGPT_COMPLETE": "complete_bash"}
    line = [sys.executable, str(script)]
    done = subprocess.run(line, env=environment(**words), text=True, capture_output=True, check=False)
    assert expected in done.stdout.split()


def test_evaluate_refuses_tokens_of_another_corpus(gpt: RunGpt, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("other text! " * 100)
    params = write_params(tmp_path / "params.yaml")
    assert gpt("tokenize", "--params", params, "--corpus", "text.txt", "--out", "tokens").returncode == 0
    done = gpt(*evaluate_line(trained, "tokens", params))
    assert done.returncode == 2
    assert str(trained / "model.pt") in only_line(done.stderr)
    assert not (tmp_path / "evaluate.json").exists()


def test_the_package_gpt_works_alone(trained: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", ROOT / "gpt", tmp_path], check=True)
    line = [sys.executable, "-m", "gpt", "generate", "--checkpoint", str(trained / "model.pt"), "--max-new-tokens", "5"]
    environment_alone = {**environment(), "PYTHONPATH": ""}
    done = subprocess.run(line, cwd=tmp_path, env=environment_alone, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
