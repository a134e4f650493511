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
from tests.support.common import ROOT, STAGES, run, stage_line, write_params
from tests.support.project import clone, dvc, dvc_environment, runs

ACCENTS = ["Été", "œuvre", "naïve", "e\u0301te\u0301", "l’âme", "«\u00a0mot\u00a0»", "🙂", "👩\u200d👧", "straße,"]
ENGLISH = ["one", "long", "line", "without", "an", "end"]
SOURCE = (ROOT / "gpt" / "training" / "trainer.py").read_text(encoding="utf-8")


def random_words(words: list[str], separators: str) -> str:
    """2,000 words in random order, one of the separators after each."""
    rng = random.Random(1)
    return "".join(rng.choice(words) + rng.choice(separators) for _ in range(2000)).strip()


TEXTS = {
    "a novel.txt": random_words(ACCENTS, "   \n"),
    "source code.py": "".join(sorted(set(SOURCE))) + SOURCE,  # every character is in the training split
    "one long line.txt": random_words(ENGLISH, " "),
}
FOLDER = "mes textes, à moi 🙂"
FAST = {"train__precision": "float32", "evaluate__precision": "float32"}
SHORT = ["-S", "train.max_steps=30", "-S", "generate.max_new_tokens=40"]


def readme_command(text: Path) -> str:
    """The README's command for a user's text, with the path of this one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("\n## Your own text\n")[2].partition("\n## ")[0]
    (line,) = re.findall(r"^\$ (dvc exp run .+)$", section, re.MULTILINE)
    (path,) = re.findall(r"download\.sources=\['(.+?)'\]", line)
    return str(line.replace(path, str(text)))


@pytest.mark.parametrize(
    ("name", "kind"), [("a novel.txt", "char"), ("source code.py", "char"), ("one long line.txt", "bpe")]
)
def test_every_stage_runs_on_the_text(run_main: RunMain, tmp_path: Path, name: str, kind: str) -> None:
    content, text = TEXTS[name], tmp_path / FOLDER / name
    text.parent.mkdir()
    text.write_bytes(content.encode())
    write_params(tmp_path / "params.yaml", **FAST, tokenize__kind=kind, tokenize__vocab_size=300)
    words = shlex.split(readme_command(text))
    for stage in STAGES:
        run_main(*stage_line(stage, *words[words.index("-S") :], *SHORT))
    assert (tmp_path / "data" / "shakespeare.txt").read_bytes() == text.read_bytes()
    tokenizer = tokenizer_from_json(json.loads((tmp_path / "data" / "tokens" / "tokenizer.json").read_text()))
    metrics = json.loads((tmp_path / "metrics" / "evaluate.json").read_text())
    assert metrics["bits_per_char"] < math.log2(len(set(content))) - 0.4, "no better than a uniform distribution"
    sample = (tmp_path / "generation_out.txt").read_text(encoding="utf-8").rpartition("=" * 80 + "\n")[2]
    if kind == "bpe":
        assert len(sample) > 40 + 1
        return
    assert tokenizer.alphabet == "".join(sorted(set(content)))
    assert len(sample) == 40 + 1
    assert set(sample[:-1]) <= set(content)
    if not set("ROMEO:") <= set(content):
        line = run_main(*stage_line("generate", *SHORT), code=2)  # with the prompts of params.yaml
        assert "'ROMEO:'" in line
        assert "generate.prompts" in line


def test_a_text_too_short_for_the_default_model_is_refused_with_a_remedy(run_main: RunMain, tmp_path: Path) -> None:
    text = tmp_path / "poem.txt"
    text.write_text(random_words(ACCENTS, " \n")[:2000], encoding="utf-8")
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
    text = tmp_path / FOLDER / "a novel.txt"
    text.parent.mkdir()
    text.write_bytes(TEXTS[text.name].encode())
    project = clone(tmp_path / "project", corpus)
    run(["sh", "-c", readme_command(text)], project, env=dvc_environment())
    (found,) = runs(project)
    assert found.info.run_name == "novel"
    assert json.loads(found.data.params["download.sources"]) == [str(text)]
    assert (project / "data" / "shakespeare.txt").read_bytes() == text.read_bytes()
    assert "prompt '', sample 1 of 1" in (project / "generation_out.txt").read_text(encoding="utf-8")
    # Without a digest in params.yaml, dvc has to be told that the file has been edited.
    text.write_bytes(text.read_bytes() * 2)
    dvc(project, "repro", "--force", "--single-item", "download")
    dvc(project, "repro", "tokenize")
    assert json.loads((project / "data" / "tokens" / "meta.json").read_text())["train_tokens"] > len(TEXTS[text.name])
