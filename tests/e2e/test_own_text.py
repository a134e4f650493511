"""A user's own text, as documented in the README, through the five commands of dvc.yaml."""

import json
import math
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest

from gpt.tokenizers import tokenizer_from_json
from tests.conftest import RunMain
from tests.support.common import FAST, ROOT, STAGES, run, stage_line, write_params
from tests.support.project import clone, dvc, dvc_environment, runs

ACCENTS = ["Été", "œuvre", "naïve", "e\u0301te\u0301", "l’âme", "«\u00a0mot\u00a0»", "🙂", "👩\u200d👧", "straße,"]
ENGLISH = ["one", "long", "line", "without", "an", "end"]
FOLDER = "mes textes, à moi 🙂"
SHORT = ["-S", "train.max_steps=30", "-S", "generate.max_new_tokens=40"]


def write_words(path: Path, words: list[str] = ACCENTS, separators: str = "   \n") -> Path:
    """Write words in random order, one of the separators after each."""
    rng = random.Random(1)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes("".join(rng.choice(words) + rng.choice(separators) for _ in range(2000)).strip().encode())
    return path


def readme_command(text: Path) -> str:
    """The README's command for a user's text, with the path of this one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Your own text\n")[2].partition("\n## ")[0]
    (line,) = re.findall(r"^\$ (dvc exp run .+)$", section, re.MULTILINE)
    (path,) = re.findall(r"download\.sources=\['(.+?)'\]", line)
    return str(line.replace(path, str(text)))


@pytest.mark.parametrize(
    ("kind", "words", "separators"), [("char", ACCENTS, "   \n"), ("bpe", ENGLISH, " ")], ids=["lines", "one long line"]
)
def test_every_stage_runs_on_the_text(
    run_main: RunMain, tmp_path: Path, kind: str, words: list[str], separators: str
) -> None:
    text = write_words(tmp_path / FOLDER / "a novel.txt", words, separators)
    content = text.read_bytes().decode()
    params = {**FAST, "tokenize__kind": kind, "tokenize__vocab_size": 300, "evaluate__sample_characters": 240}
    write_params(tmp_path / "params.yaml", **params)
    options = shlex.split(readme_command(text))
    for stage in STAGES:
        run_main(*stage_line(stage, *options[options.index("-S") :], *SHORT))
    assert (tmp_path / "data" / "shakespeare.txt").read_bytes() == text.read_bytes()
    tokenizer = tokenizer_from_json(json.loads((tmp_path / "data" / "tokens" / "tokenizer.json").read_text()))
    metrics = json.loads((tmp_path / "metrics" / "evaluate.json").read_text())
    assert metrics["val/bits_per_char"] < math.log2(len(set(content))) - 0.4, "no better than a uniform distribution"
    sample = (tmp_path / "generation_out.txt").read_text(encoding="utf-8").rpartition("=" * 80 + "\n")[2]
    if kind == "bpe":
        assert len(sample) > 40 + 1
        return
    assert tokenizer.alphabet == "".join(sorted(set(content)))
    assert len(sample) == 40 + 1
    assert set(sample[:-1]) <= set(content)
    line = run_main(*stage_line("generate", *SHORT), code=2)  # with the prompts of params.yaml
    assert "'ROMEO:'" in line
    assert "generate.prompts" in line


def test_a_text_too_short_for_the_default_model_is_refused_with_a_remedy(run_main: RunMain, tmp_path: Path) -> None:
    text = tmp_path / "poem.txt"
    text.write_text("0123456789" * 200)
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    options = ["-S", f"download.sources=['{text}']", "-S", "download.sha256=null"]
    run_main(*stage_line("download", *options))
    run_main(*stage_line("tokenize", *options))
    line = run_main(*stage_line("train", *options), code=2)
    for part in ("at least 512 tokens", "1,800", "200", "model.block_size", "at most 50"):
        assert part in line


@pytest.mark.proof
def test_the_command_of_the_readme_works_in_a_shell(corpus: Path, tmp_path: Path) -> None:
    """With a path that needs all of its quotes, as an experiment of the real dvc."""
    text = write_words(tmp_path / FOLDER / "a novel.txt")
    project = clone(tmp_path / "project", corpus)
    run(["sh", "-c", readme_command(text)], project, env=dvc_environment())
    (found,) = runs(project)
    assert found.info.run_name == "novel"
    assert json.loads(found.data.params["download.sources"]) == [str(text)]
    assert (project / "data" / "shakespeare.txt").read_bytes() == text.read_bytes()
    assert "prompt '', sample 1 of 1" in (project / "generation_out.txt").read_text(encoding="utf-8")
    # Without a digest in params.yaml, dvc has to be told that the file has been edited.
    meta = project / "data" / "tokens" / "meta.json"
    tokens = json.loads(meta.read_text())["train_tokens"]
    text.write_bytes(text.read_bytes() * 2)
    dvc(project, "repro", "--force", "--single-item", "download")
    dvc(project, "repro", "tokenize")
    assert json.loads(meta.read_text())["train_tokens"] > tokens
