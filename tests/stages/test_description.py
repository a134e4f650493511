"""The description of an MLflow run."""

import json
from pathlib import Path

import pytest

from stages.runs.description import WIDTH, description, is_unedited
from stages.runs.run_record import COMMIT, DIRTY, Record, save

TRAIN = Record(
    stage="train",
    began=0,
    ended=7,
    tags={COMMIT: "c0ffee" * 7, DIRTY: "gpt/model.py, a|b.py"},
    metrics={"val/best_loss": 1.63, "val/best_step": 2500.0},
    changes=["train.seed=2"],
    checkpoint="ab" * 32,
    checkpoint_file="my weights.pt",
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder after training and evaluation."""
    save(tmp_path, TRAIN, {})
    metrics = {"val/new_metric": 7, "val/bits_per_char": 1.5}
    save(tmp_path, Record(stage="evaluate", began=0, ended=1, metrics=metrics), {})
    return tmp_path


def test_metrics_and_commands(run: Path) -> None:
    text = description(run, "0123")
    assert "1970-01-01 00:00 UTC, commit `c0ffeec`, finished." in text
    assert "gpt/model.py, a\\|b.py" in text
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")]
    found = {name.strip(): value.strip() for name, value in rows}
    expected = {"val/best_loss": "1.6300", "val/bits_per_char": "1.5000", "val/new_metric": "7"}
    assert list(found.items())[1:4] == list(expected.items())
    commands = text.replace(" \\\n ", "")
    for line in (
        f"git checkout {'c0ffee' * 7}\n"
        "mlflow artifacts download --run-id 0123 --artifact-path params.yaml --dst-path .\n"
        f"dvc exp run -S train.seed=2\necho '{'ab' * 32}  my weights.pt' | sha256sum --check\n",
        "--artifact-path 'my weights.pt' --dst-path restored\n"
        "python -m gpt generate --checkpoint 'restored/my weights.pt' --prompt ''\n",
    ):
        assert line in commands
    assert "Sample" not in text


def test_the_model_card_has_data_metrics_and_baseline(run: Path) -> None:
    data = {
        "corpus_sha256": "c" * 64,
        "train_characters": 9000,
        "val_characters": 1000,
        "kind": "char",
        "vocab_size": 65,
    }
    save(run, TRAIN.model_copy(update={"dataset": data, "params": {"model.block_size": "128"}}), {})
    metrics = {"bits_per_char": 2.1234, "bigram_bits_per_char": 3.58, "calibration_error": 0.03, "copied_windows": 0.25}
    results = {f"val/{name}": value for name, value in metrics.items()} | {"val/longest_copy": 21}
    save(run, Record(stage="evaluate", began=0, ended=1, metrics=results), {})
    card = description(run, "0123").partition("## Model card")[2].partition("##")[0]
    for part in (
        "cccc",
        "9,000 training",
        "65 tokens",
        "2.123 bits",
        "3.580",
        "3.0%",
        "25.0%",
        "21 char",
        "128 tokens",
    ):
        assert part in card


def test_a_sample_of_any_text_fits_into_a_code_block_and_a_tag(run: Path) -> None:
    generate, params = Record(stage="generate", began=0, ended=1), json.dumps({"generate.prompts": '["it\'s", "b"]'})
    texts = {"logs/generate.log": "no sample", "params/generate.json": params, "text.txt": "a ```` b\n" * 5000}
    save(run, generate, texts)
    text = description(run, "0123")
    assert "\n\n    a ```` b\n" in text
    assert "\n    …\n" in text
    assert """--prompt 'it'"'"'s'""" in text
    assert "no sample" not in text
    assert len(text) < 8000
    assert description(run, "0123") == text
    assert is_unedited(text)
    assert not is_unedited(f"{text} ")
    assert not is_unedited(text.replace("1.6300", "1.5"))


def test_lines_of_code_blocks_fit_on_the_screen(run: Path) -> None:
    words = "one  line of   words " * 40
    save(run, Record(stage="generate", began=0, ended=1), {"text.txt": f"{words}\n\n{'x' * 300}\n"})
    changes = [f"train.learning_rate=0.00{number}" for number in range(9)]
    save(run, TRAIN.model_copy(update={"changes": changes}), {})
    text = description(run, "0123456789abcdef" * 2)
    sample = [line[4:] for line in text.splitlines() if line.startswith("    ")]
    commands = text.split("```\n")[1]
    assert max(len(line) for line in (*sample, *commands.splitlines())) <= WIDTH
    assert "".join(sample) == words + "x" * 300
    assert commands.count(" -S ") == len(changes)
