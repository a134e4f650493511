"""`python -m stages.sync`: bring the kept run folders to the tracking store; run twice, it changes nothing.

A checkpoint is uploaded where the file with that content still lies where it was written.
"""

import sys

from stages import launch, record
from stages.publish import address, brief, connect, settle, without_password


def main(_arguments: list[str]) -> int:
    """Publish every run folder; returns 1 when the store failed."""
    root = record.main_workspace()
    store_address = without_password(address(root))
    try:
        store = connect(root)
        published = [run for run in reversed(record.runs(root)) if record.read(run, "train")]
        for run in published:
            settle(store, run)
    except Exception as error:  # MLflow raises of its own, requests', SQLAlchemy's, alembic's …
        print(f"stages.sync: {store_address}: {brief(error)}; run this again later", file=sys.stderr)
        return 1
    print(f"stages.sync: {len(published)} run(s) are in {store_address}")
    return 0


if __name__ == "__main__":
    launch.enter("sync", main)
