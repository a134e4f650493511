"""Everything about one GPU, within a deadline and without a network: correctness, speed, trainings, decoding, memory.

    python3 -m benchmarks.gpu --tokens data/tokens --out gpu.json

Not run on a GPU yet. It needs torch, numpy, pandas, pydantic, typer, ruamel.yaml, tqdm and filelock. The JSON is
written after each part, so that a run that is cut off leaves its results; a part without enough time is "not run".
`--device cpu --tiny` runs all of it on a CPU in half a minute.
"""

import json
import os
import sys
import tempfile
import time
from functools import partial
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.cuda_checks import BABY, checks, resuming
from benchmarks.cuda_decoding import decodings
from benchmarks.cuda_training import BEST, compiled_speeds, speeds, trainings
from benchmarks.parts import FAILED, Part, Results, Setup, run_parts
from benchmarks.races import ROOT
from gpt.core.files import write_json

PRELOAD = ("benchmarks.cuda_decoding", "torch._dynamo")  # the first optimizer imports the latter
LEAST_S = 15  # for a process to start and use the GPU
PARTS = (  # the most valuable first; the weights are seconds of a deadline of 480
    ("checks", 45, checks),
    ("resume", 45, resuming),
    ("speed", 40, speeds),
    ("compile", 110, compiled_speeds),
    ("baby", 120, partial(trainings, BABY)),
    ("best-gpu", 85, partial(trainings, BEST)),
    ("decoding", 35, decodings),
)


def main(
    tokens: Annotated[Path, typer.Option(help="Folder written by the command tokenize.")] = ROOT / "data" / "tokens",
    out: Annotated[Path, typer.Option(help="File for the results.")] = Path("gpu.json"),
    device: Annotated[str, typer.Option(help="cuda, or cpu to test this script.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="Tiny models and few steps, to test this script.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Run this part only; repeatable.")] = None,
    deadline: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Time for all parts.")] = 480,
) -> None:
    """Run all parts; print and write one JSON. The exit code is 1 if a part failed."""
    began = time.monotonic()
    set_forkserver_preload([*PRELOAD])
    os.environ.setdefault(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # else a look for GPUs at import spoils forked processes
    found: Results = {"device": device, "tiny": tiny, "deadline_s": deadline, "parts": {}}
    least = 0.5 if tiny else LEAST_S
    parts = [Part(name, weight, least, tasks) for name, weight, tasks in PARTS if not only or name in only]
    with tempfile.TemporaryDirectory(prefix="chargpt-gpu-") as folder:
        for name, report in run_parts(parts, Setup(tokens, device, tiny), deadline, Path(folder)):
            found["parts"][name] = report
            found["seconds"] = round(time.monotonic() - began, 1)
            write_json(out, found)
            print(f"{name}: {report['status']}, {report['seconds']} s", file=sys.stderr, flush=True)
    print(json.dumps(found, indent=2, ensure_ascii=False))
    raise typer.Exit(int(any(report["status"] == FAILED for report in found["parts"].values())))


if __name__ == "__main__":
    typer.run(main)
