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
LABELS = {
    "eval_bits_per_char": "bits per character (whole validation split)",
    "eval_calibration_error": "expected calibration error",
    "eval_longest_copy": "longest generated stretch found in the training text (characters)",
    "eval_copied": "fraction of generated windows of 30 characters found in the training text",
}


def description(run: Path, run_id: str) -> str:
    """The markdown text for the records in a run folder; equal records give equal text."""
    train = read(run, "train")
    assert train
    table = "".join(
        f"| {label} | {value:{',.0f' if value.is_integer() else ',.4f'}} |\n" for label, value in _metrics(run, train)
    )
    return "\n\n".join(
        [_origin(train), f"| metric | value |\n|---|---|\n{table}", *_sample(run), *_restore(run, train, run_id)]
    )


def _origin(train: Record) -> str:
    experiment, commit = train.tags.get("dvc.exp_name"), train.tags.get("git.commit", "")[:7]
    text = f"Trained {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(train.began))}, "
    text += f"experiment **{_escaped(experiment)}**, " if experiment else ""
    text += f"commit `{commit}`, " if commit else ""
    text += f"{train.status.lower()}."
    if (changed := train.tags.get("git.changed")) and not experiment:
        text += f" Uncommitted changes, which the commit does not restore: {_escaped(changed)}."
    return text


def _metrics(run: Path, train: Record) -> Iterator[tuple[str, float]]:
    evaluate = read(run, "evaluate")
    found = evaluate.metrics if evaluate else {}
    for name in sorted(found, key=lambda name: [*LABELS, name].index(name)):
        yield LABELS.get(name, name.removeprefix("eval_").replace("_", " ")), found[name]
    for name, value in train.metrics.items():
        yield name.replace("_", " "), value
    if "parameters" in train.tags:
        yield "parameters", float(train.tags["parameters"])
    yield "duration of the last training command (s)", float(round(train.ended - train.began))


def _sample(run: Path) -> Iterator[str]:
    """The beginning of the generated text, indented as a code block."""
    for path in (path for name, path in artifacts(run, "generate") if "/" not in name):
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = [*text[:LONGEST_SAMPLE].splitlines(), *["…"] * (len(text) > LONGEST_SAMPLE)]
        wrapper = textwrap.TextWrapper(WIDTH, replace_whitespace=False, drop_whitespace=False)
        wrapped = (part for line in lines for part in wrapper.wrap(line) or [""])
        yield "## Sample\n\n" + "\n".join(f"    {part}" for part in wrapped)


def _restore(run: Path, train: Record, run_id: str) -> Iterator[str]:
    """Up to three code blocks of shell commands."""
    commit, experiment = train.tags.get("git.commit"), train.tags.get("dvc.exp_name")
    checkout = f"git checkout {commit}\n" if commit else ""
    download = f"mlflow artifacts download --run-id {run_id} \\\n  --artifact-path"
    repro = " \\\n  ".join(["dvc exp run", *(f"-S {shlex.quote(change)}" for change in train.changes)])
    commands = f"{checkout}{download} params.yaml --dst-path .\n{repro if train.changes else 'dvc repro'}"
    if train.checkpoint:
        line = shlex.quote(f"{train.checkpoint}  {train.checkpoint_file}")
        commands += f"\necho {line} \\\n  | sha256sum --check"
    yield "## Restore"
    yield "All results, from DVC's cache or trained again to the same bytes. This replaces `params.yaml`:"
    yield f"```\n{commands}\n```"
    if experiment and commit:
        yield "The same in the workspace of the experiment, including its code changes:"
        yield f"```\n{checkout}dvc exp apply {shlex.quote(experiment)}\n```"
    if train.checkpoint:
        name = Path(train.checkpoint_file).name
        generate = (
            f"python -m gpt generate --checkpoint {shlex.quote(f'restored/{name}')} \\\n  --prompt {_prompt(run)}"
        )
        yield "Only the checkpoint, for generation:"
        yield f"```\n{download} {shlex.quote(name)} --dst-path restored\n{generate}\n```"


def _prompt(run: Path) -> str:
    """The first prompt of the stage generate, whose characters the model knows; else the empty prompt."""
    generate = read(run, "generate")
    prompts = json.loads(generate.tags.get("generate.prompts", "[]")) if generate else []
    prompt = str(prompts[0]) if prompts else ""
    return shlex.quote(prompt if len(prompt) <= LONGEST_NAME else "")


def _escaped(text: str) -> str:
    """A name without markdown syntax."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text[:LONGEST_NAME])
