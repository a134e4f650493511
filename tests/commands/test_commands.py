"""The commands as a user runs them: their outputs, and the error messages."""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from gpt.model.checkpoint import load_checkpoint
from tests.conftest import RunMain
from tests.support.common import ROOT, environment, run, train_line, write_params


def evaluate_line(trained: Path, tokens: str | Path, params: Path) -> list[str | Path]:
    tables = ("positions", "blocks", "calibration")
    outputs = ["--metrics", "evaluate.json", *(word for name in tables for word in (f"--{name}", f"{name}.csv"))]
    return ["evaluate", "--params", params, "--tokens", tokens, "--checkpoint", trained / "model.pt", *outputs]


def test_a_warning_on_a_cpu_without_bfloat16(
    run_main: RunMain, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONEDNN_MAX_CPU_ISA makes torch see an older CPU."""
    code = "import torch, gpt.model.device; print(gpt.model.device.slow_in_bfloat16(torch.device('cpu')))"
    assert run([sys.executable, "-c", code], tmp_path, env=environment(ONEDNN_MAX_CPU_ISA="AVX2")).stdout == "True\n"
    monkeypatch.setattr("gpt.training.run.slow_in_bfloat16", lambda device: True)
    write_params(tmp_path / "params.yaml", train__max_steps=1, train__optimizer="adamw")
    for precision, warned in (("bfloat16", True), ("float32", False)):
        printed = run_main(*train_line(tokens, "-S", f"train.precision={precision}"))
        assert ("float32 will be faster" in printed) == warned


def test_train_writes_its_outputs_and_no_other_files(trained: Path) -> None:
    files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    tables = {"plots/history.csv", "plots/validation.csv"}
    assert files == tables | {"params.yaml", "model.pt", "metrics/train.json", "gpt_nano.log"}
    metrics = json.loads((trained / "metrics" / "train.json").read_text())
    about = load_checkpoint(trained / "model.pt").about
    assert list(metrics) == ["val/best_loss", "val/best_step", "train/loss_at_best_step", "train/parameters"]
    assert (metrics["val/best_step"], metrics["val/best_loss"]) == (about["step"], round(about["val_loss"], 4))
    header, *rows = (trained / "plots" / "history.csv").read_text().splitlines()
    assert header == "step,train/loss,train/learning_rate,train/grad_norm"
    assert [row.split(",")[0] for row in rows] == ["10", "20"]
    header, *rows = (trained / "plots" / "validation.csv").read_text().splitlines()
    assert (header, [row.split(",")[0] for row in rows]) == ("step,val/loss", ["20"])


def test_evaluate_reproduces_the_validation_loss_of_training(
    run_main: RunMain, trained: Path, tokens: Path, tmp_path: Path
) -> None:
    printed = run_main(*evaluate_line(trained, tokens, trained / "params.yaml"), "--pictures", "pictures")
    names = {"attention.png", "positions.png", "embeddings.png", "loss_by_position.png", "calibration.png"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names
    metrics = json.loads((tmp_path / "evaluate.json").read_text())
    val_loss = load_checkpoint(trained / "model.pt").about["val_loss"]
    expected = ["bits_per_char", "bigram_bits_per_char", "calibration_error", "longest_copy", "copied_windows"]
    assert list(metrics) == [f"val/{name}" for name in expected]
    bigram = re.search(r"bigram ([\d.]+)", printed)
    assert bigram
    assert metrics["val/bigram_bits_per_char"] == pytest.approx(float(bigram[1]) / math.log(2), abs=0.001)
    assert metrics["val/bits_per_char"] == pytest.approx(val_loss / math.log(2), abs=0.001)
    assert f"loss {val_loss:.4f} nats" in printed
    assert len((tmp_path / "positions.csv").read_text().splitlines()) == 1 + 32
    assert len((tmp_path / "blocks.csv").read_text().splitlines()) == 1 + 100
    header, *rows = (tmp_path / "calibration.csv").read_text().splitlines()
    assert header == "probability,right,ideal,predictions"
    assert 1 < len(rows) <= 10


def test_evaluate_refuses_tokens_of_another_corpus(run_main: RunMain, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("other text! " * 100)
    params = write_params(tmp_path / "params.yaml")
    run_main("tokenize", "--params", params, "--corpus", "text.txt", "--out", "tokens")
    assert str(trained / "model.pt") in run_main(*evaluate_line(trained, "tokens", params), code=2)
    assert not (tmp_path / "evaluate.json").exists()


def test_a_samples_file_contains_the_digests_of_checkpoint_and_corpus(
    run_main: RunMain, trained: Path, tmp_path: Path
) -> None:
    line = ["generate", "--checkpoint", trained / "model.pt", "--params", trained / "params.yaml", "--prompt", ""]
    run_main(*line, "--out", "a/text.txt", "-S", "generate.samples=2")
    document = (tmp_path / "a" / "text.txt").read_text()
    assert hashlib.sha256((trained / "model.pt").read_bytes()).hexdigest() in document
    assert str(load_checkpoint(trained / "model.pt").about["corpus_sha256"]) in document
    assert "prompt '', sample 2 of 2" in document


def test_generate_options_prompt_file_stop_and_no_cache(run_main: RunMain, trained: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompt.txt"
    prompts.write_bytes(b"the quick\nbrown ")
    generate = partial(run_main, "generate", "--checkpoint", trained / "model.pt", "--prompt-file", prompts)
    continued = partial(generate, "--max-new-tokens", "80", "--top-p", "0.9")
    text = continued("--samples", "3")
    assert text == continued("--samples", "3", "--no-cache")
    assert text.count("the quick\nbrown ") == 3
    whole, ended = continued(), continued("--stop", "zzz", "--stop", " ")
    assert whole.startswith(ended.rstrip("\n") + " ")
    assert " " not in ended.removeprefix("the quick\nbrown ")
    for option, value in (("--top-p", "0"), ("--repetition-penalty", "0"), ("--stop", "")):
        printed = generate(option, value, code=2)
        assert option in printed or f"generate.{option[2:].replace('-', '_')}" in printed
    prompts.write_bytes(b"\xff")
    assert "expected UTF-8, found invalid start byte at byte 0" in generate(code=2)


def test_the_package_gpt_works_alone_and_a_closed_pipe_is_not_an_error(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "gpt", tmp_path / "gpt")
    line = f"'{sys.executable}' -m gpt generate --checkpoint '{trained / 'model.pt'}' --prompt 'the ' | head -c 3"
    done = run(["sh", "-c", line], tmp_path, env=environment(PYTHONPATH=""))
    assert (done.stdout, done.stderr) == ("the", "")


MISTAKES = {
    "trian": ["'trian'", "Did you mean 'train'? Try: "],
    "train --tokenz x": ["--tokenz"],
    "train --params params.yaml": ["--tokens"],
    "tokenize --params none.yaml --corpus x --out y": ["none.yaml"],
    "tokenize --params params.yaml --corpus none.txt --out y": ["none.txt"],
    "TRAIN --tokens nowhere": ["nowhere/meta.json", "run the stage"],
    "TRAIN -S train.device=cuda": ["train.device", "cuda", "auto"],
    "TRAIN -S model.block_size=535": ["too short", "2,140", "model.block_size 535"],
    "TRAIN --run-dir params.yaml/x": ["params.yaml/x", "Not a directory"],
    "generate --checkpoint MODEL --prompt 'Zé the'": ["prompt 'Zé the'", "'Z', 'é'", "generate.prompts", "--prompt"],
    "generate --checkpoint none.pt": ["none.pt", "No such file"],
    "generate --checkpoint MODEL --temperature -1": ["--temperature", "greater than or equal to 0"],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_user_error_is_one_line_and_exit_code_2(
    run_main: RunMain, line: str, trained: Path, tokens: Path, tmp_path: Path
) -> None:
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    write_params(tmp_path / "params.yaml")
    words = {"MODEL": [str(trained / "model.pt")], "TRAIN": train_line(tokens)}
    message = run_main(*(each for word in shlex.split(line) for each in words.get(word, [word])), code=2)
    for part in MISTAKES[line]:
        assert part in message
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left <= {"params.yaml", "gpt_nano.log", "metrics", "plots", "y"}


@pytest.mark.skipif(not hasattr(os, "pipe2"), reason="only Linux has pipes that keep single writes apart")
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


def test_log_file_is_repeatable(run_main: RunMain, tmp_path: Path) -> None:
    """Both files contain the error; the default log file is not written."""
    line = ["download", "--params", "none.yaml", "--out", "x", "--log-file", "a/one.log", "--log-file", "two.log"]
    run_main(*line, code=2)
    assert "download: ended" in (tmp_path / "a" / "one.log").read_text()
    assert (tmp_path / "a" / "one.log").read_text() == (tmp_path / "two.log").read_text()
    assert not (tmp_path / "gpt_nano.log").exists()


def test_without_arguments_help_is_printed_and_version_is_an_option(run_main: RunMain) -> None:
    assert run_main() == run_main("--help")
    assert run_main("--version").startswith("chargpt ")


@pytest.mark.parametrize(("typed", "expected"), [("chargpt tok", "tokenize"), ("chargpt download --s", "--set")])
def test_shell_completion_of_the_console_script(tmp_path: Path, typed: str, expected: str) -> None:
    (tmp_path / "chargpt").write_text("from gpt.__main__ import main\nmain()\n")
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_CHARGPT_COMPLETE": "complete_bash"}
    done = run([sys.executable, "chargpt"], tmp_path, code=None, env=environment(**words))
    assert expected in done.stdout.split()
