"""`python -m stages.lineage FILE|RUN|MODEL [--verify] [--json]`: print what a file, a run or a model was made of."""

import argparse
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.core.errors import printable
from gpt.fast_import import fast_import
from stages.command_line import enter
from stages.lineage.chain import Chains
from stages.lineage.evidence import Evidence
from stages.lineage.items import VERIFIED, Item
from stages.lineage.subject import trace
from stages.lineage.tree import tree
from stages.publish import SQLITE, prepare_client, tracking_uri, without_credentials
from stages.run_record import main_workspace

if TYPE_CHECKING:
    from stages.tracking.lookup import Lookup

DESCRIPTION = """Print what a generated text, a checkpoint, a metrics file, a run or a model was made of, and where each
part is now. Everything is found by its hash, also if the file was copied elsewhere or is an earlier version."""


def main(arguments: Sequence[str]) -> int:
    """Print the chain; returns 1 if `--verify` found a problem.

    Raises:
        UserError: nothing is known about the given file, run or model.

    """
    parser = argparse.ArgumentParser("python -m stages.lineage", description=DESCRIPTION)
    parser.add_argument("subject", metavar="FILE|RUN|MODEL", help="path; run key or MLflow run id; models:/NAME@ALIAS")
    parser.add_argument("--verify", action="store_true", help="read and compare every copy; exit 1 if one is wrong")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    root = main_workspace()
    tracking, absent = open_tracking(root)
    try:
        item = trace(Chains(Evidence(root), tracking, verify=options.verify, absent=absent), options.subject)
    except ConnectionError as error:  # the store failed after it was opened
        absent = str(error)
        item = trace(Chains(Evidence(root), None, verify=options.verify, absent=absent), options.subject)
    problems = item.all_problems()
    if options.json:
        print(json.dumps({**item.to_dict(), "mlflow": absent or "available", "all_problems": problems}, indent=2))
    else:
        print(tree(item) + (f"\n\nMLflow was not searched: {printable(absent)}" if absent else ""))
        if options.verify:
            print("\n" + summary(item, problems))
    return int(options.verify and bool(problems))


def open_tracking(root: Path) -> tuple["Lookup | None", str]:
    """The tracking store, or why there is none."""
    address = tracking_uri(root)
    if address.startswith(SQLITE) and not Path(address.removeprefix(SQLITE).partition("?")[0]).exists():
        return None, f"there is no store {without_credentials(address)}"
    prepare_client()
    try:
        return fast_import("stages.tracking.lookup").Lookup(address), ""
    except ConnectionError as error:
        return None, str(error)


def summary(item: Item, problems: Sequence[str]) -> str:
    """The result of `--verify`."""
    verified = sum(place.state == VERIFIED for each in item.walk() for place in each.places)
    lines = [f"{verified} copies verified, {len(problems)} problem(s)", *(f"  {printable(line)}" for line in problems)]
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # quietly end in `… | head`
    enter("lineage", main)
