"""The description of an MLflow run: metrics, origin, a model card, a sample, commands to restore the model."""

import hashlib
import json
import math
import re
import shlex
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from gpt.core.files import read_json
from stages.runs.run_record import COMMIT, DIRTY, Record, artifacts, read

LONGEST_SAMPLE, LONGEST_NAME = 1500, 500  # characters; the whole text has to fit into one MLflow tag, 8,000
LEADING = ("val/best_loss", "val/bits_per_char")  # the metrics by which models are compared
WIDTH = 90  # of lines in code blocks; wider ones push the neighbouring column off the screen


def description(run: Path, run_id: str) -> str:
    """The markdown text for the records in a run folder; equal records give equal text.

    It ends with its own digest in a comment, by which `is_unedited` recognizes it.
    """
    train, evaluate = read(run, "train"), read(run, "evaluate")
    assert train
    metrics = (
        (evaluate.metrics if evaluate else {}) | train.metrics | {"training_s": float(round(train.ended - train.began))}
    )
    metrics = {name: metrics[name] for name in LEADING if name in metrics} | metrics
    table = [f"| {name} | {value:,.{0 if value.is_integer() else 4}f} |" for name, value in metrics.items()]
    parts = ["\n".join(["| metric | value |", "|---|---|", *table]), _origin(train)]
    parts += [*_model_card(train, metrics), *_sample(run)]
    return _signed("\n\n".join([*parts, *_restore(run, train, run_id)]))


def is_unedited(text: str) -> bool:
    """Whether a text is one of `description`, without edits by a user."""
    return _signed(text.partition("\n\n<!-- ")[0]) == text


def _signed(text: str) -> str:
    return f"{text}\n\n<!-- SHA-256 of this text: {hashlib.sha256(text.encode()).hexdigest()} -->"


def _origin(train: Record) -> str:
    experiment, commit = train.tags.get("dvc.exp_name"), train.tags.get(COMMIT, "")[:7]
    text = f"Trained {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(train.began))}, "
    text += f"experiment **{_escaped(experiment)}**, " if experiment else ""
    text += f"commit `{commit}`, " if commit else ""
    text += f"{train.status.lower()}."
    if (changed := train.tags.get(DIRTY)) and not experiment:
        text += f" Uncommitted changes, which the commit does not restore: {_escaped(changed)}."
    return text


def _model_card(train: Record, metrics: Mapping[str, float]) -> Iterator[str]:
    """What a user of the model needs to know, as far as it is known yet."""
    if not train.checkpoint:
        return
    data, get = train.dataset, metrics.get
    lines = {
        "Intended use": "learning how a GPT and this pipeline work. The text is meant to be neither true nor safe."
    }
    if data:
        splits = (
            f"{data.get('train_characters', 0):,} training and {data.get('val_characters', 0):,} validation characters"
        )
        vocabulary = f"{data.get('kind')} tokenizer with {data.get('vocab_size', 0):,} tokens"
        lines["Data"] = f"text with SHA-256 `{str(data.get('corpus_sha256'))[:12]}…`, {splits}; {vocabulary}."
    if bits := get("val/bits_per_char"):
        baseline = f"; bigram frequencies: {get('val/bigram_bits_per_char', math.nan):.3f}"
        error = f"{get('val/calibration_error', math.nan):.1%}"
        lines["Quality"] = f"{bits:.3f} bits per character of the validation text{baseline}. Calibration error {error}."
        copied, longest = get("val/copied_windows", math.nan), get("val/longest_copy", math.nan)
        lines["Memorization"] = (
            f"{copied:.1%} of the 30-character windows of generated text occur in the training text; the longest copy "
            f"has {longest:.0f} characters."
        )
    context = train.params.get("model.block_size", "?")
    lines["Limits"] = f"a context of {context} tokens; characters that the training text lacks cannot be encoded."
    lines["License"] = "MIT, for code and weights; the training text has its own (tiny Shakespeare: public domain)."
    yield "\n".join(["## Model card", "", *(f"- **{name}:** {text}" for name, text in lines.items())])


def _sample(run: Path) -> Iterator[str]:
    """The beginning of the generated text, indented as a code block."""
    for path in (path for name, path in artifacts(run, "generate") if "/" not in name):
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = [*text[:LONGEST_SAMPLE].splitlines(), *["…"] * (len(text) > LONGEST_SAMPLE)]
        wrapper = textwrap.TextWrapper(WIDTH, replace_whitespace=False, drop_whitespace=False)
        wrapped = (part for line in lines for part in wrapper.wrap(line) or [""])
        yield "## Sample\n\n" + "\n".join(f"    {part}" for part in wrapped)


def _restore(run: Path, train: Record, run_id: str) -> Iterator[str]:
    """Shell commands that restore all results, or the checkpoint alone."""
    commit = train.tags.get(COMMIT)
    download = f"mlflow artifacts download --run-id {run_id} \\\n  --artifact-path"
    repro = " \\\n  ".join(["dvc exp run", *(f"-S {shlex.quote(change)}" for change in train.changes)])
    commands = f"git checkout {commit}\n" if commit else ""
    commands += f"{download} params.yaml --dst-path .\n{repro if train.changes else 'dvc repro'}"
    if train.checkpoint:
        line = shlex.quote(f"{train.checkpoint}  {train.checkpoint_file}")
        commands += f"\necho {line} \\\n  | sha256sum --check"
    yield "## Restore"
    yield "All results, from DVC's cache or trained again to the same bytes. This replaces `params.yaml`:"
    yield f"```\n{commands}\n```"
    if train.checkpoint:
        name = Path(train.checkpoint_file).name
        prompt = shlex.quote(next((text for text in _prompts(run) if len(text) <= LONGEST_NAME), ""))
        command = f"python -m gpt generate --checkpoint {shlex.quote(f'restored/{name}')} \\\n  --prompt {prompt}"
        yield "Only the checkpoint, for generation:"
        yield f"```\n{download} {shlex.quote(name)} --dst-path restored\n{command}\n```"


def _prompts(run: Path) -> list[str]:
    path = dict(artifacts(run, "generate")).get("params/generate.json")
    found: list[str] = json.loads(read_json(path).get("generate.prompts", "[]")) if path else []
    return found


def _escaped(text: str) -> str:
    """A name without markdown syntax."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text[:LONGEST_NAME])
