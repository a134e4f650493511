"""Training on one device: the speed of a step with and without compilation, and complete trainings of presets."""

import gc
import math
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.cuda_checks import BABY, CheckFailedError, start
from benchmarks.parts import Results, Setup, Task
from benchmarks.races import ROOT, timed
from benchmarks.steps import operations, seconds, trainer
from gpt.core.params import read_section
from gpt.data.token_files import load_tokens
from gpt.model.config import ModelConfig
from gpt.model.device import choose_device
from gpt.training.distributed import process_group
from gpt.training.history import read_records
from gpt.training.trainer import TrainParams

BEST = "presets/best-gpu.yaml"
TARGETS = {BABY: 1.4655, BEST: 1.45}  # validation loss
# As nanoGPT trains on a GPU: in bfloat16, the whole batch at once. Shards are for several processes.
ON_GPU = ("train.precision=bfloat16", "train.shards=1", "train.save_interval=100000")
TINY = (
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "model.block_size=32",
    "model.ngram_rows=64",
    "model.ngram_width=8",
    "train.batch_size=8",
    "train.max_steps=30",
    "train.warmup_steps=5",
    "train.log_interval=5",
    "train.eval_interval=15",
)
WARM_UP, BLOCKS = 5, 5  # steps that are not measured, blocks of steps that are
STOP_S = 10  # for the end of a training after SIGTERM, at most a fifth of the limit


def speeds(setup: Setup) -> Mapping[str, Task]:
    """Steps without compilation."""
    float32 = "train.precision=float32"
    variants = {BABY: (), f"{BABY}, float32": (float32,), BEST: (), "params.yaml": ()}
    return {
        name: partial(speed, name.partition(",")[0], [*changes(setup), *more], setup) for name, more in variants.items()
    }


def compiled_speeds(setup: Setup) -> Mapping[str, Task]:
    """Steps with `train.compile`."""
    return {name: partial(speed, name, [*changes(setup), "train.compile=true"], setup) for name in (BABY, BEST)}


def trainings(recipe: str, setup: Setup) -> Mapping[str, Task]:
    """One complete training."""
    return {"training": partial(train, recipe, setup)}


def changes(setup: Setup) -> list[str]:
    """The changes of every preset."""
    return [*ON_GPU, f"train.device={setup.device}", *(TINY if setup.tiny else ())]


def speed(recipe: str, changed: Sequence[str], setup: Setup) -> Results:
    """Time of a training step: median, least and greatest mean of a few blocks of steps; also the peak memory."""
    device = choose_device(setup.device, "--device")
    reset_peak_memory(device)
    with process_group(device, timeout_s=60) as group:
        each = trainer(recipe, load_tokens(setup.tokens), group, *changed)
        first_step_s = seconds(each.train_step, 1)
        for _ in range(WARM_UP):
            each.train_step()

        steps = 2 if setup.tiny else 20

        def block() -> None:
            for _ in range(steps):
                each.train_step()
            synchronize(device)

        times = [seconds(block, 1) / steps for _ in range(BLOCKS)]
        evaluation_s = seconds(each.evaluate, 1)
        flops = None if each.params.compile else operations(each)  # cannot be counted in compiled code
        tokens = each.params.batch_size * each.model.config.block_size
    middle = statistics.median(times)
    return {
        "ms_per_step": {"median": 1e3 * middle, "least": 1e3 * min(times), "greatest": 1e3 * max(times)},
        "tokens_per_second": tokens / middle,
        "tflops_per_second": flops and flops / middle / 1e12,
        "first_step_s": first_step_s,  # with train.compile, these two contain the compilation
        "first_evaluation_s": evaluation_s,
        "peak_memory_gb": peak_memory(device) / 1e9,
    }


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Free what earlier tasks left on a GPU, and measure its peak memory anew."""
    if device.type == "cuda":
        gc.collect()  # models in reference cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The largest number of bytes that torch has allocated on a GPU, or that this process used on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def train(recipe: str, setup: Setup) -> Results:
    """Train a preset with the command `train`; a training that does not fit into the limit is stopped and reported.

    Raises:
        CheckFailedError: the training fails, or its loss is not finite.
    """
    settings = changes(setup)
    params = read_section(ROOT / recipe, "train", TrainParams, settings)
    batch = params.batch_size * read_section(ROOT / recipe, "model", ModelConfig, settings).block_size
    compiled = compilation_pays(recipe, params.max_steps * batch, setup)
    with tempfile.TemporaryDirectory(prefix="chargpt-train-") as name:
        folder = Path(name)
        began = time.monotonic()
        process = start(ROOT / recipe, setup.tokens, folder, *settings, f"train.compile={str(compiled).lower()}")
        complete = ends_in_time(process, setup.limit_s - min(STOP_S, setup.limit_s / 5))
        whole = time.monotonic() - began
        if process.returncode and complete:
            raise CheckFailedError(f"exit code {process.returncode}: {(folder / 'output.txt').read_text()[-1000:]}")
        points = list(timed(read_records(folder / "run-dir" / "history.jsonl"), batch))
    if not (points and all(math.isfinite(loss) for _, _, loss in points)):
        raise CheckFailedError(f"expected evaluations within {setup.limit_s:.0f} s, found {points}")
    return summary(points, params.max_steps, TARGETS[recipe]) | {
        "compiled": compiled,
        "whole_process_s": whole,
        "changes": settings,
        **({} if complete else {"ended": f"stopped after {setup.limit_s:.0f} s"}),
    }


def compilation_pays(recipe: str, tokens: int, setup: Setup) -> bool:
    """Whether the measured speeds say that a training over this number of tokens is shorter with `train.compile`."""
    eager, compiled = (setup.earlier.get(part, {}).get(recipe) for part in ("speed", "compile"))
    if not (isinstance(eager, dict) and isinstance(compiled, dict)) or "error" in eager or "error" in compiled:
        return False
    compilation = compiled["first_step_s"] + compiled["first_evaluation_s"]
    return bool(compilation + tokens / compiled["tokens_per_second"] < tokens / eager["tokens_per_second"])


def ends_in_time(process: "subprocess.Popen[str]", limit_s: float) -> bool:
    """Wait for the end of a training; at the limit, send SIGTERM, which lets it finish its step."""
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return False
    return True


def summary(points: list[tuple[float, int, float]], max_steps: int, target: float) -> Results:
    """The course of a training, its lowest loss, and the time of training until the target was reached."""
    reached = [seconds for seconds, _, loss in points if loss <= target]
    return {
        "val_loss": min(loss for _, _, loss in points),
        "target": target,
        "training_s_to_target": reached[0] if reached else None,
        "training_s": points[-1][0],
        "steps": points[-1][1],
        "max_steps": max_steps,
        "points": points,  # (seconds of training, step, validation loss)
    }
