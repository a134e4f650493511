"""`python -m stages.promote`: register a model, and make it the champion if it is better beyond noise.

Without options: the model of the workspace. Exit codes: 0 promoted or champion already, 1 kept, 2 user error.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.core.errors import UserError, printable
from gpt.core.files import sha256_file
from stages.execution.command_line import Parser, enter
from stages.release.comparison import Verdict, judge, table
from stages.runs.publish import brief, connect, tracking_uri, without_credentials
from stages.runs.run_record import experiment_name, main_workspace

if TYPE_CHECKING:
    from stages.tracking.champions import Champions
    from stages.tracking.registry import Model, Registry

CHECKPOINT = Path("chargpt_nano.pt")


def main(arguments: Sequence[str]) -> int:
    """Register and compare a model, roll back, or print the history; returns the exit code.

    Raises:
        UserError: wrong options, no such model, a model without results to compare, or the store failed.
    """
    options = _options(arguments)
    root = main_workspace()
    try:
        return _perform(options, root)
    except UserError:
        raise
    except Exception as error:  # of MLflow, requests, SQLAlchemy, the disk …
        address = without_credentials(tracking_uri(root))
        raise UserError(f"{address}: {brief(error)}; correct MLFLOW_TRACKING_URI or run this again later") from error


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("python -m stages.promote", description=__doc__, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", metavar="ID", help="promote the model of this MLflow run")
    which.add_argument("--experiment", metavar="NAME", help="promote the model of this DVC experiment, or run name")
    which.add_argument("--rollback", action="store_true", help="make the previous champion the champion again")
    which.add_argument("--history", action="store_true", help="print who was champion from when to when")
    parser.add_argument("--dry-run", action="store_true", help="print the result, change nothing")
    return parser.parse_args(arguments)


def _perform(options: argparse.Namespace, root: Path) -> int:
    store = connect(root, experiment_name())
    from stages.tracking.champions import Champions  # noqa: PLC0415 (imports MLflow)
    from stages.tracking.registry import Registry  # noqa: PLC0415

    registry = Registry(store)
    champions = Champions(registry)
    if not options.history and not options.dry_run:
        with store.lock():
            champions.record_present()
    if options.history:
        print(_history(registry, champions))
        return 0
    if options.rollback:
        return _roll_back(registry, champions, dry_run=options.dry_run)
    return _promote(registry, champions, _chosen(registry, options), dry_run=options.dry_run)


def _chosen(registry: "Registry", options: argparse.Namespace) -> "Model":
    """The model that the options name, or that of the workspace's checkpoint."""
    if options.run:
        return registry.model(options.run)
    if name := options.experiment:
        missing = (
            f"--experiment {name}: expected a DVC experiment with a run in MLflow, or the name of a run, found none"
        )
        remedy = f"run dvc exp apply {name}, then python -m stages.promote"
        return registry.find({"dvc.exp_name": name, "mlflow.runName": name}, f"{missing}; {remedy}")
    if not CHECKPOINT.is_file():
        raise UserError(
            f"{CHECKPOINT}: expected a checkpoint, found no file; run dvc repro, or name a model with --run"
        )
    sha256 = sha256_file(CHECKPOINT)
    missing = f"{CHECKPOINT}: expected an MLflow run of this checkpoint ({sha256[:8]}), found none"
    return registry.find({"checkpoint.sha256": sha256}, f"{missing}; run python -m stages.sync")


def _promote(registry: "Registry", champions: "Champions", model: "Model", *, dry_run: bool) -> int:
    """Compare and, unless it is a dry run, register the model, write the verdict and move the alias.

    Downloads happen outside the lock; if another process changed the champion meanwhile, compare again.
    """
    candidate = registry.evaluation(model, verify=True)
    while True:
        champion = registry.champion()
        if champion and champion.run_id == model.run_id:
            print(f"{champion} is the champion already")
            return 0
        verdict = judge(candidate, registry.evaluation(champion, verify=False) if champion else None)
        if dry_run:
            print(_report(model, champion, verdict), "\n(dry run: nothing was changed)", sep="\n")
            return 0 if verdict.promoted else 1
        with registry.store.lock():
            if registry.champion() == champion:
                model = registry.register(model)
                _apply(registry, champions, model, champion, verdict)
                return 0 if verdict.promoted else 1


def _apply(
    registry: "Registry", champions: "Champions", model: "Model", champion: "Model | None", verdict: Verdict
) -> None:
    """Write the verdict, then move an alias: a killed promotion is completed by the next one."""
    report = _report(model, champion, verdict)
    tags = {"promotion.champion": champion.version if champion else "none"}
    if verdict.difference:
        tags |= {"promotion.difference": f"{verdict.difference.bits:+.4f}"}
        tags |= {"promotion.interval": verdict.difference.interval}
    registry.write(model, verdict, tags, report)
    if verdict.promoted:
        champions.promote(model)
    else:
        registry.challenge(model)
    print(report)


def _report(model: "Model", champion: "Model | None", verdict: Verdict) -> str:
    """The comparison as Markdown text, which is readable in a terminal too."""
    models = f"- candidate: {model}\n- champion: {champion or 'none'}"
    note = "The difference is candidate minus champion, in bits per character: below 0 the candidate is better."
    parts = [models, table(verdict.checks), *([note] if verdict.difference else []), f"**{verdict.text}**"]
    return printable("\n\n".join(parts))


def _roll_back(registry: "Registry", champions: "Champions", *, dry_run: bool) -> int:
    with registry.store.lock():
        present, version = registry.champion(), champions.previous()
        if not dry_run:
            champions.roll_back(version)
    would = "would be" if dry_run else "is"
    print(f"{registry.registered(version)} {would} the champion again, instead of {present}")
    return 0


def _history(registry: "Registry", champions: "Champions") -> str:
    """A line for each change of the champion, the oldest first."""
    changes, versions = champions.changes(), registry.versions()
    if not changes:
        return "no champion yet"
    ends = [*(change.time for change in changes[1:]), ""]
    lines = [f"{'version':7}  {'champion from (UTC)':19}  {'to':19}  {'run':32}  how"]
    for change, end in zip(changes, ends, strict=True):
        run = versions[change.version].run_id if change.version in versions else "(deleted)"
        lines.append(f"{change.version:7}  {_minute(change.time)}  {_minute(end)}  {run or '':32}  {change.how}")
    return "\n".join(lines)


def _minute(time: str) -> str:
    """A time of the history to the second; for an empty one, that it is not over."""
    return f"{time[:19].replace('T', ' ') or 'now':19}"


if __name__ == "__main__":
    enter("promote", main)
