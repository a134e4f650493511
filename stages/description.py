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
    rows = "".join(f"| {label} | {value} |\n" for label, value in _metrics(run, train))
    sample = next((path for name, path in artifacts(run, "generate") if "/" not in name), None)
    parts = [_origin(train), f"| metric | value |\n|---|---|\n{rows}"]
    if sample:
        text = sample.read_text(encoding="utf-8", errors="replace")
        parts += ["## Sample", _block(_wrapped(text[:LONGEST_SAMPLE]) + "\n…" * (len(text) > LONGEST_SAMPLE))]
    return "\n\n".join([*parts, "## Restore", *_commands(run, train, run_id)]) + "\n"


def _origin(train: Record) -> str:
    experiment, commit = train.tags.get("dvc.exp_name"), train.tags.get("git.commit", "")[:7]
    names = [f"experiment **{_escaped(experiment)}**"] if experiment else []
    names += [f"commit `{commit}`"] if commit else []
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(train.began))
    text = ", ".join(["Trained", when, *names, train.status.lower()]) + "."
    if (changed := train.tags.get("git.changed")) and not experiment:
        text += f" Uncommitted changes, which the commit does not restore: {_escaped(changed)}."
    return text


def _metrics(run: Path, train: Record) -> Iterator[tuple[str, str]]:
    evaluate = read(run, "evaluate")
    found = evaluate.metrics if evaluate else {}
    for name in [*(name for name in LABELS if name in found), *(name for name in found if name not in LABELS)]:
        yield LABELS.get(name, name.removeprefix("eval_").replace("_", " ")), _number(found[name])
    for name, value in train.metrics.items():
        yield name.replace("_", " "), _number(value)
    if "parameters" in train.tags:
        yield "parameters", _number(float(train.tags["parameters"]))
    yield "duration of the last training command (s)", _number(round(train.ended - train.began))


def _commands(run: Path, train: Record, run_id: str) -> Iterator[str]:
    commit, experiment = train.tags.get("git.commit"), train.tags.get("dvc.exp_name")
    name = Path(train.checkpoint_file).name
    changes = [f"-S {shlex.quote(change)}" for change in train.changes]
    commands = [f"git checkout {commit}"] if commit else []
    commands += [_download(run_id, "params.yaml", "."), _command("dvc exp run", *changes) if changes else "dvc repro"]
    if train.checkpoint:
        line = shlex.quote(f"{train.checkpoint}  {train.checkpoint_file}")
        commands.append(_command(f"echo {line}", "| sha256sum --check"))
    yield "All results, from DVC's cache or trained again to the same bytes. This replaces `params.yaml`:"
    yield _block("\n".join(commands))
    if experiment and commit:
        yield "The same in the workspace of the experiment, including its code changes:"
        yield _block(f"git checkout {commit}\ndvc exp apply {shlex.quote(experiment)}")
    if train.checkpoint:
        generate = f"python -m gpt generate --checkpoint {shlex.quote(f'restored/{name}')}"
        yield "Only the checkpoint, for generation:"
        yield _block(f"{_download(run_id, name, 'restored')}\n{_command(generate, f'--prompt {_prompt(run)}')}")
    yield "If the tracking store is not this workspace's `mlflow.db`, set `MLFLOW_TRACKING_URI`."


def _download(run_id: str, name: str, folder: str) -> str:
    options = f"--artifact-path {shlex.quote(name)}", f"--dst-path {folder}"
    return _command(f"mlflow artifacts download --run-id {run_id}", *options)


def _prompt(run: Path) -> str:
    """The first prompt of the stage generate, whose characters the model knows; else the empty prompt."""
    generate = read(run, "generate")
    prompts = json.loads(generate.tags.get("generate.prompts", "[]")) if generate else []
    prompt = str(prompts[0]) if prompts else ""
    return shlex.quote(prompt if len(prompt) <= LONGEST_NAME else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4f}"


def _escaped(text: str) -> str:
    """A name without markdown syntax."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text[:LONGEST_NAME])


def _wrapped(text: str) -> str:
    """The text with long lines broken, and no other change."""
    wrapper = textwrap.TextWrapper(WIDTH, expand_tabs=False, replace_whitespace=False, drop_whitespace=False)
    return "\n".join("\n".join(wrapper.wrap(line)) for line in text.split("\n"))


def _command(*parts: str) -> str:
    """A shell command with one part per line."""
    return " \\\n  ".join(parts)


def _block(text: str) -> str:
    """A code block; its fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"
