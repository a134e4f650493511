"""The description of an MLflow run: origin, metrics, a sample of the generated text, commands to restore the model."""

import json
import re
import shlex
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from stages.run_record import Record, artifacts, read

LONGEST_SAMPLE, LONGEST_NAME = 1500, 500  # characters; the whole text has to fit into one MLflow tag, 8,000
WIDTH = 90  # of lines in code blocks; wider ones push the neighbouring column off the screen


def description(run: Path, run_id: str) -> str:
    """The markdown text for the records in a run folder; equal records give equal text."""
    train, evaluate = read(run, "train"), read(run, "evaluate")
    assert train
    metrics = (
        (evaluate.metrics if evaluate else {}) | train.metrics | {"training_s": float(round(train.ended - train.began))}
    )
    table = [f"| {name} | {value:,.{0 if value.is_integer() else 4}f} |" for name, value in metrics.items()]
    parts = [_origin(train), "\n".join(["| metric | value |", "|---|---|", *table]), *_sample(run)]
    return "\n\n".join([*parts, *_restore(run, train, run_id)])


def _origin(train: Record) -> str:
    experiment, commit = train.tags.get("dvc.exp_name"), train.tags.get("git.commit", "")[:7]
    text = f"Trained {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(train.began))}, "
    text += f"experiment **{_escaped(experiment)}**, " if experiment else ""
    text += f"commit `{commit}`, " if commit else ""
    text += f"{train.status.lower()}."
    if (changed := train.tags.get("git.changed")) and not experiment:
        text += f" Uncommitted changes, which the commit does not restore: {_escaped(changed)}."
    return text


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
    commit, generate = train.tags.get("git.commit"), read(run, "generate")
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
        prompts = json.loads(generate.tags.get("generate.prompts", "[]")) if generate else []
        prompt = shlex.quote(next((text for text in prompts if len(text) <= LONGEST_NAME), ""))
        command = f"python -m gpt generate --checkpoint {shlex.quote(f'restored/{name}')} \\\n  --prompt {prompt}"
        yield "Only the checkpoint, for generation:"
        yield f"```\n{download} {shlex.quote(name)} --dst-path restored\n{command}\n```"


def _escaped(text: str) -> str:
    """A name without markdown syntax."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text[:LONGEST_NAME])
