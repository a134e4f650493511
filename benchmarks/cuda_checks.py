"""Checks of a device against the CPU: logits, decoding, training, and resuming after SIGKILL."""

import itertools
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.parts import Results, Setup, Task
from benchmarks.races import ROOT, outputs
from benchmarks.steps import trainer
from gpt.core.files import read_json, sha256_file
from gpt.core.params import read_section
from gpt.data.dataset import evaluation_windows
from gpt.data.loss import token_losses
from gpt.data.token_files import load_tokens
from gpt.generation.decoding import Decoder
from gpt.model.baselines import make_model
from gpt.model.checkpoint import load_checkpoint
from gpt.model.config import ModelConfig
from gpt.model.device import choose_device
from gpt.model.gpt import LanguageModel
from gpt.training.distributed import process_group
from gpt.training.history import read_records

BABY = "presets/baby.yaml"
SMOKE = ROOT / "presets" / "smoke.yaml"
VOCABULARY = 65
FLOAT32 = 1e-4  # largest difference between two devices, relative to the largest logit; measured on a CPU: 1e-6
MIN_DECREASE = 0.3  # of the loss, in nats
RESUMED = 0.05  # largest difference in loss to an uninterrupted training on a GPU, whose sums have no fixed order
STEPS, SAVE_INTERVAL, POLL_S, PATIENCE_S = 60, 5, 0.002, 120


class CheckFailedError(Exception):
    """A device computes something else than expected."""


def checks(setup: Setup) -> Mapping[str, Task]:
    """The tasks that need no other process."""
    schemes = get_args(ModelConfig.model_fields["position"].annotation)
    models = {name: read_section(SMOKE, "model", ModelConfig, [f"model.position={name}"]) for name in schemes}
    if not setup.tiny:
        models |= {path: read_section(ROOT / path, "model", ModelConfig) for path in ("params.yaml", BABY)}
    recipes = {"float32, AdamW": ("float32", "adamw"), "bfloat16, Muon": ("bfloat16", "muon")}
    return {
        "device": partial(describe, setup.device),
        **{f"logits: {name}": partial(compare_logits, model, setup.device) for name, model in models.items()},
        **{f"training: {name}": partial(train_briefly, *recipe, setup) for name, recipe in recipes.items()},
    }


def describe(device: str) -> Results:
    """The device and the versions."""
    found = choose_device(device, "--device")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda}
    if found.type != "cuda":
        return {"name": "CPU", **versions}
    properties = torch.cuda.get_device_properties(found)
    return {"name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1), **versions}


def compare_logits(config: ModelConfig, device: str) -> Results:
    """Compare logits in float32 with those of the CPU: of a whole window, and of the cached decoder step by step.

    Raises:
        CheckFailedError: they differ by more than `FLOAT32` of the largest logit.
    """
    where = choose_device(device, "--device")
    model = random_model(config)
    torch.manual_seed(1)
    tokens_T = torch.randint(VOCABULARY, (config.block_size,))
    with torch.inference_mode():
        expected_TV = model(tokens_T[None])[0].float()
        model.to(where)
        window_TV = model(tokens_T[None].to(where))[0].float().cpu()
    decoder, half = Decoder(model, 1), config.block_size // 2
    (prefilled_TV,) = decoder.add([tokens_T[:half].tolist()])
    steps_TV = torch.cat([prefilled_TV, *(decoder.step([token]) for token in tokens_T[half:].tolist())])
    largest = float(expected_TV.abs().max())
    found = {
        name: float((logits_TV - expected_TV).abs().max()) / largest
        for name, logits_TV in {"window": window_TV, "decoder": steps_TV}.items()
    }
    if not max(found.values()) < FLOAT32:  # also for NaN
        raise CheckFailedError(f"expected logits within {FLOAT32} of those of the CPU, found differences of {found}")
    return {"relative_difference": found}


def random_model(config: ModelConfig) -> LanguageModel:
    """A model on the CPU whose weights are so large that every token matters."""
    torch.manual_seed(0)
    model = make_model(config, VOCABULARY).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model


def train_briefly(precision: str, optimizer: str, setup: Setup) -> Results:
    """Train the smoke preset and compare the validation loss with that before, and with the same weights on the CPU.

    Raises:
        CheckFailedError: the loss does not fall, or the CPU finds another loss.
    """
    changes = [f"train.precision={precision}", f"train.optimizer={optimizer}", "train.weight_average=0.0"]
    with process_group(choose_device(setup.device, "--device"), timeout_s=60) as group:
        each = trainer("presets/smoke.yaml", load_tokens(setup.tokens), group, *changes)
        before = each.evaluate()
        for _ in range(each.params.max_steps):
            each.train_step()
        after = each.evaluate()
        validation = evaluation_windows(each.data, block_size=each.model.config.block_size, batch_size=64)
        losses = token_losses(each.model.cpu(), validation, torch.device("cpu"))  # in float32
    on_cpu = sum(float(part.sum()) for part in losses) / len(each.data.val)
    found = {"before": before, "after": after, "after_on_cpu": on_cpu}
    tolerance = 1e-4 if precision == "float32" else 1e-2
    if not (after < before - MIN_DECREASE and math.isclose(after, on_cpu, abs_tol=tolerance)):
        raise CheckFailedError(f"expected a loss that falls, within {tolerance} of that of the CPU, found {found}")
    return found


def resuming(setup: Setup) -> Mapping[str, Task]:
    """The task that kills a training."""
    return {"kill and resume": partial(kill_and_resume, setup.tokens, setup.device)}


def kill_and_resume(tokens: Path, device: str) -> Results:
    """Kill a training with SIGKILL, run it again, and compare with an uninterrupted one that runs at the same time.

    Raises:
        CheckFailedError: the training does not continue, its history has gaps, or its loss is another one; on a CPU,
            also other bytes.
    """
    with tempfile.TemporaryDirectory(prefix="chargpt-resume-") as name:
        interrupted, whole = Path(name) / "interrupted", Path(name) / "whole"
        started = {folder: start(SMOKE, tokens, folder, *resume_changes(device)) for folder in (interrupted, whole)}
        killed_at = kill_after_save(started[interrupted], interrupted)
        resumed = start(SMOKE, tokens, interrupted, *resume_changes(device))
        for process in (resumed, started[whole]):
            finish(process)
        printed = (interrupted / "output.txt").read_text()
        steps = [record.step for record in read_records(interrupted / "run-dir" / "history.jsonl")]
        losses = [read_json(folder / "metrics")["val/best_loss"] for folder in (interrupted, whole)]
        load_checkpoint(interrupted / "checkpoint")
        equal = len({sha256_file(folder / "checkpoint") for folder in (interrupted, whole)}) == 1
    found = {"killed_after_step": killed_at, "losses": losses, "equal_bits": equal}
    complete = steps[-1] == STEPS and all(a < b for a, b in itertools.pairwise(steps)) and "continuing after" in printed
    close = abs(losses[0] - losses[1]) <= RESUMED if device != "cpu" else equal
    if not (complete and close):
        raise CheckFailedError(f"expected the results of an uninterrupted training, found {found}, steps {steps}")
    return found


def resume_changes(device: str) -> list[str]:
    """Enough steps for a kill in the middle, and frequent resume states."""
    intervals = f"train.save_interval={SAVE_INTERVAL}", f"train.eval_interval={STEPS // 2}"
    return [f"train.max_steps={STEPS}", f"train.device={device}", "train.shards=1", *intervals]


def kill_after_save(process: "subprocess.Popen[str]", folder: Path) -> int:
    """Send SIGKILL after the first resume state; returns the step of the newest one."""
    until = time.monotonic() + PATIENCE_S
    while not list(folder.glob("run-dir/resume-*.pt")):
        if process.poll() is not None or time.monotonic() > until:
            raise CheckFailedError(f"expected a training, found: {(folder / 'output.txt').read_text()[-500:]}")
        time.sleep(POLL_S)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise CheckFailedError("expected a training that runs until it is killed, found that it ended before")
    return max(int(path.stem.rpartition("-")[2]) for path in folder.glob("run-dir/resume-*.pt"))


def start(params: Path, tokens: Path, folder: Path, *changes: str) -> "subprocess.Popen[str]":
    """Start the command `train`; its files and `output.txt` are in the folder."""
    folder.mkdir(exist_ok=True)
    words: list[Any] = [sys.executable, "-m", "gpt", "train", "--params", params, "--tokens", tokens.resolve()]
    words += [*outputs(folder), *itertools.chain.from_iterable(("-S", change) for change in changes)]
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True)


def finish(process: "subprocess.Popen[str]", limit_s: float = PATIENCE_S) -> None:
    """Wait for the end of a training.

    Raises:
        CheckFailedError: its exit code is not 0.
    """
    if code := process.wait(limit_s):
        raise CheckFailedError(f"expected exit code 0 of the training, found {code}")
