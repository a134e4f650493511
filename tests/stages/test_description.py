"""What a run's page in MLflow shows beside its figures: description, pictures, what the machine was doing."""

import json
from pathlib import Path

import pytest

from stages.history import Follower
from stages.page import page
from stages.pictures import of_evaluation, of_training
from stages.publish import drawn
from stages.record import Record, save
from stages.system import Sampler

POINTS = [{"step": step, "train_loss": 4 - step / 50, "learning_rate": step / 9e3, "time": step} for step in range(9)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as the three stages leave it."""
    (tmp_path / "history.jsonl").write_text("".join(f"{json.dumps(p | {'tokens_per_second': 900})}\n" for p in POINTS))
    tags = {"git.commit": "c0ffee" * 7, "git.changed": "gpt/model.py, a|b.py", "parameters": "12345"}
    figures = {"best_val_loss": 1.63, "best_step": 2500.0}
    train = Record(stage="train", began=0, ended=7, tags=tags, metrics=figures, changes=["train.seed=2"])
    checkpoint = {"checkpoint": "ab" * 32, "checkpoint_file": "my weights.pt"}
    save(tmp_path, train.model_copy(update=checkpoint), {})
    save(
        tmp_path,
        Record(stage="evaluate", began=0, ended=1, metrics={"eval_bits_per_char": 1.5, "eval_new_thing": 7}),
        {},
    )
    return tmp_path


def test_the_page_tells_figures_and_commands(run: Path) -> None:
    text = page(run, "0123")
    assert text.startswith("Commit `c0ffeec`, begun 1970-01-01 00:00 UTC, finished. Not committed at that time")
    for line in (
        "gpt/model.py, a\\|b.py.",
        "| bits a character, on the whole validation split | 1.5000 |",
        "| new thing | 7 |",
        "| at step | 2,500 |",
        "| parameters | 12,345 |",
        "| tokens a second (median) | 900 |",
        f"git checkout {'c0ffee' * 7}\n"
        "mlflow artifacts download --run-id 0123 --artifact-path params.yaml --dst-path .\n"
        f"dvc exp run -S train.seed=2\necho '{'ab' * 32}  my weights.pt' \\\n  | sha256sum --check\n",
        "--artifact-path 'my weights.pt' \\\n  --dst-path restored\n"
        "python -m gpt generate --checkpoint 'restored/my weights.pt' --prompt ''\n",
    ):
        assert line in text
    assert "dvc exp apply" not in text
    assert "What it writes" not in text


def test_a_sample_of_any_text_fits_into_a_block_and_a_tag(run: Path) -> None:
    generate = Record(stage="generate", began=0, ended=1, tags={"generate.prompts": '["it\'s", "b"]'})
    save(run, generate, {"logs/generate.log": "no sample", "text.txt": "a ```` b\n" * 5000})
    text = page(run, "0123")
    assert "\n`````\na ```` b\n" in text
    assert "\n…\n`````\n" in text
    assert """--prompt 'it'"'"'s'""" in text
    assert "no sample" not in text
    assert len(text) < 8000
    assert page(run, "0123") == text


def test_no_line_of_a_block_is_so_wide_that_it_pushes_its_neighbours_off_the_screen(run: Path) -> None:
    words = "one  line \t of   words " * 40
    save(run, Record(stage="generate", began=0, ended=1), {"text.txt": f"{words}\n\n{'x' * 300}\n"})
    changes = [f"train.learning_rate=0.00{number}" for number in range(9)]
    train = Record(stage="train", began=0, ended=7, changes=changes)
    save(run, train.model_copy(update={"checkpoint": "ab" * 32, "checkpoint_file": "w.pt"}), {})
    blocks = page(run, "0123456789abcdef" * 2).split("```\n")[1::2]
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 90
    sample, commands, _ = blocks
    assert sample.replace("\n", "") == words + "x" * 300
    assert "dvc exp run -S train.learning_rate=0.000 -S train.learning_rate=0.001 \\\n  -S" in commands
    assert commands.replace(" \\\n ", "").count(" -S ") == len(changes)


def test_pictures(tmp_path: Path) -> None:
    """Same numbers, same bytes; a table that is not there costs a line and no other picture."""
    positions, calibration = tmp_path / "positions.csv", tmp_path / "calibration.csv"
    positions.write_text("position,loss\n1,4.1\n2,3.0\n")
    calibration.write_text("probability,right,predictions\n0.1,0.2,7\n0.5,,0\n0.9,0.8,3\n")
    with_loss = [{**POINTS[-1], "val_loss": 2.0}]
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    found = dict([*of_training(POINTS + with_loss), *of_evaluation(positions, calibration, drawn)])
    assert sorted(found) == ["calibration.png", "learning_rate.png", "loss.png", "loss_by_position.png"]
    assert all(content.startswith(b"\x89PNG") for content in found.values())
    assert len(set(found.values())) == 4
    assert (
        dict(of_training(POINTS + with_loss))["loss.png"] == found["loss.png"] != dict(of_training(POINTS))["loss.png"]
    )
    assert list(of_training([])) == []
    assert list(dict(of_evaluation(positions, None, drawn))) == ["loss_by_position.png"]
    (drawn / "attention.png").write_bytes(b"maps")
    assert dict(of_evaluation(positions, None, drawn))["attention.png"] == b"maps"


def test_a_picture_that_cannot_be_drawn_costs_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    positions = tmp_path / "positions.csv"
    positions.write_text("position,loss\n1,4.1\n")
    found = drawn("evaluate", lambda: of_evaluation(positions, tmp_path / "missing.csv", tmp_path))
    assert list(found) == ["pictures/loss_by_position.png"]
    assert capsys.readouterr().err.startswith("stages.evaluate: not all pictures are drawn: FileNotFoundError ")


def test_samples_are_numbered_on_even_after_a_line_that_was_torn(tmp_path: Path) -> None:
    path = tmp_path / "system.jsonl"
    first = Sampler(path, every_s=0)
    for _ in range(3):
        first.look()
    with path.open("a") as file:
        file.write('{"step": 2, "ti')
    second = Sampler(path, every_s=60)
    for _ in range(3):
        second.look()
    points = Follower(path).news()
    assert [point["step"] for point in points] == [0, 1, 2]
    for point in points:
        assert 0 < point["system/system_memory_usage_percentage"] <= 100
        assert 0 <= point["system/cpu_utilization_percentage"] <= 100
        assert len([name for name in point if name.startswith("system/")]) == 8


def test_a_sampler_that_fails_costs_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampler = Sampler(tmp_path / "gone" / "system.jsonl", every_s=0)
    for _ in range(4):
        sampler.look()
    said = capsys.readouterr().err
    assert said.startswith("stages.train: no more system metrics: FileNotFoundError ")
    assert said.count("\n") == 1
