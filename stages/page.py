"""The description on a run's page in MLflow: what it is, its figures, a sample of its text, how to get it back."""

import json
import re
import shlex
import statistics
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from stages.history import Follower
from stages.record import Record, artifacts, read

LONGEST_SAMPLE = 1500  # characters; the whole page has to fit into one of MLflow's tags, 8,000
LONGEST_LINE = 500
WIDEST = 90  # characters a line of a block; wider, it pushes its neighbours out of a screen of 1920 pixels
FIGURES = {  # of evaluation, and the words and units for them; one that is not named here is shown by its own name
    "eval_bits_per_char": "bits a character, on the whole validation split",
    "eval_calibration_error": "how far off its own probabilities are, on average",
    "eval_longest_copy": "longest stretch it wrote that stands in the training text, in characters",
    "eval_copied": "share of what it wrote that stands there, in windows of 30 characters",
}


def page(run: Path, run_id: str) -> str:
    """The markdown text, built from the records in a run folder; the same records give the same text.

    Args:
        run_id: MLflow's, for the commands that fetch something from there.

    """
    train = read(run, "train")
    assert train
    parts = [_headline(train), _table(run, train), _sample(run), _commands(run, train, run_id)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(train: Record) -> str:
    experiment, commit = train.tags.get("dvc.exp_name"), train.tags.get("git.commit", "")[:7]
    names = [f"experiment **{_inline(experiment)}**"] if experiment else []
    names += [f"commit `{commit}`"] if commit else []
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(train.began))
    text = f"{', '.join(names) or 'A training'}, begun {when}, {train.status.lower()}."
    if (changed := train.tags.get("git.changed")) and not experiment:
        text += f" Not committed at that time, so that the commit alone does not bring it back: {_inline(changed)}."
    return text[0].upper() + text[1:]


def _table(run: Path, train: Record) -> str:
    rows = [f"| {label} | {value} |" for label, value in _figures(run, train)]
    return "\n".join(["| figure | value |", "|---|---|", *rows]) if rows else ""


def _figures(run: Path, train: Record) -> Iterator[tuple[str, str]]:
    evaluate = read(run, "evaluate")
    found = evaluate.metrics if evaluate else {}
    for name in [name for name in FIGURES if name in found] + [name for name in found if name not in FIGURES]:
        yield FIGURES.get(name, name.removeprefix("eval_").replace("_", " ")), _number(found[name])
    if "best_val_loss" in train.metrics:
        yield "best validation loss while training, nats a token", _number(train.metrics["best_val_loss"])
    if "best_step" in train.metrics:
        yield "at step", _number(train.metrics["best_step"])
    if "parameters" in train.tags:
        yield "parameters", _number(float(train.tags["parameters"]))
    points = Follower(run / "history.jsonl").news()
    if speeds := [point["tokens_per_second"] for point in points if "tokens_per_second" in point]:
        yield "tokens a second (median)", f"{statistics.median(speeds):,.0f}"
    yield "seconds that the training command took, since it was last started", f"{train.ended - train.began:,.0f}"


def _sample(run: Path) -> str:
    """The head of what the stage generate wrote."""
    texts = [path for name, path in artifacts(run, "generate") if "/" not in name]
    if not texts:
        return ""
    text = texts[0].read_text(encoding="utf-8", errors="replace")
    head = text[:LONGEST_SAMPLE]
    return "## What it writes\n\n" + _block(_wrapped(head) + ("\n…" if len(text) > len(head) else ""))


def _commands(run: Path, train: Record, run_id: str) -> str:
    commit, experiment = train.tags.get("git.commit"), train.tags.get("dvc.exp_name")
    changes = [f"-S {shlex.quote(change)}" for change in train.changes]
    again = _command("dvc exp run", *changes) if changes else "dvc repro"
    restore = [f"git checkout {commit}"] if commit else []
    restore += [_download(run_id, "params.yaml", "."), again]
    texts = [
        "## How to get it back",
        "All of it, out of DVC's cache or trained again to the same bytes; this replaces `params.yaml`:",
    ]
    texts.append(_block("\n".join(restore + _check(train))))
    if experiment and commit:
        texts.append("The same in the workspace where the experiment was made, with what it changed in the code:")
        texts.append(_block(f"git checkout {commit}\ndvc exp apply {shlex.quote(experiment)}"))
    if train.checkpoint:
        name = Path(train.checkpoint_file).name
        checkpoint = f"--checkpoint {shlex.quote(f'restored/{name}')}"
        write = _command("python -m gpt generate", checkpoint, f"--prompt {_prompt(run)}")
        texts.append("The checkpoint alone, to write with it:")
        texts.append(_block(f"{_download(run_id, name, 'restored')}\n{write}"))
    texts.append("A server other than this workspace's own is named by `MLFLOW_TRACKING_URI`.")
    return "\n\n".join(texts)


def _download(run_id: str, name: str, to: str) -> str:
    artifact = f"--artifact-path {shlex.quote(name)}"
    return _command("mlflow artifacts download", f"--run-id {run_id}", artifact, f"--dst-path {to}")


def _check(train: Record) -> list[str]:
    if not train.checkpoint:
        return []
    return [_command(f"echo {shlex.quote(f'{train.checkpoint}  {train.checkpoint_file}')}", "| sha256sum --check")]


def _prompt(run: Path) -> str:
    """The first prompt of the stage generate, which the model surely can read; without one, the empty prompt."""
    generate = read(run, "generate")
    prompts = json.loads(generate.tags.get("generate.prompts", "[]")) if generate else []
    prompt = str(prompts[0]) if prompts else ""
    return shlex.quote(prompt if len(prompt) <= LONGEST_LINE else "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.4f}"


def _inline(text: str) -> str:
    """A name of somebody's choice, without the signs that markdown would act on."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text[:LONGEST_LINE])


def _wrapped(text: str) -> str:
    """A text with its wide lines broken, between words where that can be; nothing else of it changes."""
    wrapper = textwrap.TextWrapper(WIDEST, expand_tabs=False, replace_whitespace=False, drop_whitespace=False)
    return "\n".join("\n".join(wrapper.wrap(line)) for line in text.split("\n"))


def _command(*parts: str) -> str:
    """A shell's command, gone on with in a new line before the part with which a line would be too wide."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]} {part}"
        if len(longer) + len(" \\") > WIDEST:
            lines.append(f"  {part}")
        else:
            lines[-1] = longer
    return " \\\n".join(lines)


def _block(text: str) -> str:
    """A code block; its fence is longer than any within the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"
