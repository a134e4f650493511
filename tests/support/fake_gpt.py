"""A stand-in for the commands of gpt: the same options, files and messages, without a model. It follows plan.json."""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil

PATHS = (
    *("checkpoint", "metrics", "history", "validation", "positions", "blocks", "calibration", "pictures", "out"),
    "run-dir",
)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def log(files: list[Path], mark: str, text: str) -> None:
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(f"2026-11-21 07:00:00 INFO {mark}: {text}\n")


def train(options: argparse.Namespace, plan: dict[str, Any]) -> None:
    folder: Path = options.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_history(folder / "history.jsonl", plan)
    log(options.log_file, f"train[{folder.name[:8]}]", "started")
    while plan.get("hold") and not Path("go").exists():
        time.sleep(0.05)
    train_slowly(folder / "history.jsonl", plan)
    if plan.get("hang"):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
        Path("ready").touch()
        time.sleep(60)
    write(options.checkpoint, plan.get("weights", "weights"))
    write(options.history, "step,train/loss\n1,2.99\n")
    write(options.validation, "step,val/loss\n5,3.45\n")
    write(options.metrics, json.dumps({"val/best_loss": 1.5, "val/best_step": 10, "train/parameters": 99}))


def train_slowly(history: Path, plan: dict[str, Any]) -> None:
    """Take steps of a quarter of a second, eight of which fill a pipe on stderr; write down what they took."""
    began, wrapper = time.perf_counter(), psutil.Process(os.getppid())
    for step in range(plan["steps"], plan["steps"] + plan.get("slow_steps", 0)):
        time.sleep(0.25)
        with history.open("a") as file:
            file.write(json.dumps({"step": step, "train/loss": 3 - step / 100, "time": 1763700000 + step / 8}) + "\n")
        sys.stderr.write(f"{'some warning':100}\n" * 82)
        sys.stderr.flush()
    spent = {"seconds": time.perf_counter() - began, "wrapper_cpu": sum(wrapper.cpu_times()[:2])}
    Path("took.json").write_text(json.dumps({**spent, "ended": time.time()}))


def write_history(history: Path, plan: dict[str, Any]) -> None:
    """Truncate the history to the step to resume from, then append the points, each in two writes."""
    resume = plan.get("resume", 0)
    old = history.read_text().splitlines(keepends=True) if history.exists() else []
    truncated = history.with_name("truncated")
    truncated.write_text("".join(old[:resume]))
    truncated.replace(history)
    for step in range(resume, plan["steps"]):
        point = {"step": step, "train/loss": 3 - step / 100, "train/learning_rate": 0.1, "train/grad_norm": 1.0}
        point |= {"time": 1763700000 + plan.get("later", 0) + step / 8, "train/tokens_per_second": time.perf_counter()}
        if step % 5 == 0:
            point["val/loss"] = 3.5 - step / 100
        line = json.dumps(point) + "\n"
        with history.open("a") as file:
            file.write(line[:20])
            file.flush()
            file.write(line[20:])


def evaluate(options: argparse.Namespace, plan: dict[str, Any]) -> None:
    write(options.metrics, json.dumps({"val/bits_per_char": plan["loss"], "val/characters": 7}))
    write(options.positions, "position,loss\n1,2\n")
    write(options.blocks, "block,characters,nats\n1,7,10.5\n")
    write(options.calibration, "probability,right,ideal,predictions\n0.5,0.6,0.5,7\n")
    write(options.pictures / "attention.png", "attention maps")


def main() -> None:
    plan: dict[str, Any] = json.loads(Path("plan.json").read_text())
    parser = argparse.ArgumentParser()
    parser.add_argument("verb")
    parser.add_argument("--log-file", type=Path, action="append")
    for name in PATHS:
        parser.add_argument(f"--{name}", type=Path)
    options, _ = parser.parse_known_args()
    Path("child.json").write_text(json.dumps({"argv": sys.argv, "env": dict(os.environ), "pid": os.getpid()}))
    if "stderr" in plan:
        print(plan["stderr"], file=sys.stderr)
    if "exit" in plan:
        sys.exit(plan["exit"])
    if options.verb == "train":
        train(options, plan)
    elif options.verb == "evaluate":
        evaluate(options, plan)
    else:
        write(options.out, "ROMEO: hm\n")
    if options.verb != "train":
        log(options.log_file, options.verb, "started")


if __name__ == "__main__":
    main()
