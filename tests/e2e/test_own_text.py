"""Own texts, as the README says, through the five commands of dvc.yaml: from the file to what the model writes."""

import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from gpt.__main__ import main
from gpt.tokenizers import tokenizer_from_json
from tests.support.common import ROOT, only_line, write_params
from tests.support.project import clone, rows, variables

STAGES: dict[str, Any] = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
ACCENTS = ["Été", "œuvre", "naïve", "e\u0301te\u0301", "l’âme", "«\u00a0mot\u00a0»", "🙂", "👩\u200d👧", "straße,"]
ENGLISH = ["one", "long", "line", "without", "an", "end"]


def babble(words: list[str], ends: str) -> str:
    """2,000 words in random order, one of `ends` between two of them."""
    chance = random.Random(1)
    return "".join(chance.choice(words) + chance.choice(ends) for _ in range(2000)).strip()


SOURCE = (ROOT / "gpt" / "training" / "trainer.py").read_text(encoding="utf-8")
TEXTS = {
    "a novel.txt": babble(ACCENTS, "   \n"),
    "source code.py": "".join(sorted(set(SOURCE))) + SOURCE,  # so that training sees every character
    "one long line.txt": babble(ENGLISH, " "),
}
FOLDER = "mes textes, à moi 🙂"
SMALL = ["-S", "train.max_steps=30", "-S", "generate.max_new_tokens=40"]


def readme_line(text: Path) -> str:
    """The line that README gives for an own text, with this text in place of README's."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Your own text\n")[2].partition("\n## ")[0]
    (line,) = re.findall(r"^\$ (dvc exp run .+)$", section, re.MULTILINE)
    (path,) = re.findall(r"download\.sources=\['(.+?)'\]", line)
    return str(line.replace(path, str(text)))


def run(stage: str, more: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """A stage's command as dvc.yaml has it, but in this process: importing torch five times takes too long."""
    words = shlex.split(STAGES[stage]["cmd"])
    monkeypatch.setattr(sys, "argv", ["gpt", *words[words.index("gpt") + 1 :], *more])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.fixture(params=TEXTS)
def text(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / FOLDER / str(request.param)
    path.parent.mkdir()
    path.write_bytes(TEXTS[path.name].encode())
    return path


def test_an_own_text_goes_all_the_way(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    changes = shlex.split(readme_line(text))
    changes = changes[changes.index("-S") :] + SMALL
    for stage in STAGES:
        assert not run(stage, changes, monkeypatch), capsys.readouterr().err
    assert (tmp_path / "data" / "shakespeare.txt").read_bytes() == text.read_bytes()
    content = TEXTS[text.name]
    tokenizer = tokenizer_from_json(json.loads((tmp_path / "data" / "tokens" / "tokenizer.json").read_text()))
    assert tokenizer.alphabet == "".join(sorted(set(content)))
    figures = json.loads((tmp_path / "metrics" / "evaluate.json").read_text())
    assert figures["bits_per_char"] < math.log2(tokenizer.vocab_size) - 0.4, "better than guessing"
    written = (tmp_path / "generation_out.txt").read_text(encoding="utf-8").rpartition("=" * 80 + "\n")[2]
    assert len(written) == 40 + 1
    assert set(written[:-1]) <= set(content)
    capsys.readouterr()
    if set("ROMEO:") <= set(content):
        return
    assert run("generate", SMALL, monkeypatch) == 2  # with the prompts of params.yaml
    line = only_line(capsys.readouterr().err)
    for part in ("prompt 'ROMEO:': expected only the", "generate.prompts", "an empty one always works"):
        assert part in line


def test_a_poem_is_too_short_for_the_default_model_and_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poem = tmp_path / "poem.txt"
    poem.write_text(babble(ACCENTS, " \n")[:2000], encoding="utf-8")
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    own = ["-S", f"download.sources=['{poem}']", "-S", "download.sha256=null"]
    assert not run("download", own, monkeypatch)
    assert not run("tokenize", own, monkeypatch)
    capsys.readouterr()
    assert run("train", own, monkeypatch) == 2
    line = only_line(capsys.readouterr().err)
    expected = "the text is too short: expected at least 512 tokens in each split (4 blocks of model.block_size 128)"
    assert f"{expected}, found 1,800 to train on and 200 to validate on; set model.block_size to at most 50" in line


@pytest.mark.proof
def test_the_line_of_the_readme_works_as_it_stands(corpus: Path, tmp_path: Path) -> None:
    """Through a shell, with a path that needs all of its quotes, as an experiment of the real dvc."""
    text = tmp_path / FOLDER / "a novel.txt"
    text.parent.mkdir()
    text.write_bytes(TEXTS[text.name].encode())
    project = clone(tmp_path / "project", corpus)
    done = subprocess.run(
        ["sh", "-c", readme_line(text)], cwd=project, env=variables(), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = rows(project)
    assert row.info.run_name == "novel"
    assert json.loads(row.data.params["download.sources"]) == [str(text)]
    assert (project / "data" / "shakespeare.txt").read_bytes() == text.read_bytes()
    said = (project / "generation_out.txt").read_text(encoding="utf-8")
    assert "prompt '', sample 1 of 1" in said
    # The file has been edited: dvc, which was given no digest, is told to fetch it again.
    text.write_bytes(text.read_bytes() * 2)
    for words in (["repro", "--force", "--single-item", "download"], ["repro", "tokenize"]):
        subprocess.run(["dvc", *words], cwd=project, env=variables(), check=True, capture_output=True)
    assert json.loads((project / "data" / "tokens" / "meta.json").read_text())["train_tokens"] > len(TEXTS[text.name])
