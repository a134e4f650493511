"""The models that a server has loaded, and their replacement when a new version appears."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch

from gpt.core.errors import OneLineError
from gpt.core.files import sha256_file
from gpt.generation.text import decoding_memory
from gpt.model.checkpoint import Checkpoint, load_checkpoint
from gpt.model.device import CPU_THREADS
from gpt.model.gpt import LanguageModel, count_parameters
from gpt.model.memory import check_memory
from gpt.serving.engine import Engine
from gpt.serving.protocol import RequestError
from gpt.tokenizers.base import Tokenizer

log = logging.getLogger("gpt")


class Source(Protocol):
    """Where a model comes from."""

    @property
    def name(self) -> str:
        """The name that clients use."""

    def version(self) -> str:
        """Identifies the content; another value means that there is a new model."""

    def fetch(self) -> Path:
        """The checkpoint."""


@dataclass(frozen=True)
class FileSource:
    """A checkpoint on disk."""

    path: Path
    name: str

    def version(self) -> str:  # noqa: D102 (see Source)
        try:
            status = self.path.stat()
        except OSError:
            return "missing"
        return f"{status.st_ino} {status.st_mtime_ns} {status.st_size}"

    def fetch(self) -> Path:  # noqa: D102
        return self.path


class ServedModel:
    """A loaded model with its engine."""

    def __init__(self, name: str, checkpoint: Checkpoint, sha256: str, engine: Engine, module: LanguageModel) -> None:
        self.name, self.sha256, self.engine, self.module = name, sha256, engine, module
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.config, self.block_size = checkpoint.model, checkpoint.model.block_size
        self.created = int(time.time())

    def describe(self) -> dict[str, Any]:
        """The entry of `/v1/models`."""
        config = self.config
        attention = {"gpt": (config.n_layer, config.n_head), "bigram": (0, 0)}.get(config.kind, (1, 1))
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "chargpt",
            "sha256": self.sha256,
            "kind": config.kind,
            "layers": attention[0],
            "heads": attention[1],
            "block_size": config.block_size,
            "position": config.position,
            "ngram": config.ngram,
            "tokenizer": self.tokenizer.kind,
            "vocab_size": self.tokenizer.vocab_size,
            "parameters": count_parameters(self.module),
        }


class ModelPool:
    """The models by name; the first one is the default. All compute in one thread, so that they share it evenly."""

    def __init__(self, sources: Sequence[Source], *, max_batch_size: int, max_queue_size: int) -> None:
        self.models: dict[str, ServedModel] = {}
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._sizes = {"max_batch_size": max_batch_size, "max_queue_size": max_queue_size}
        self._sources = sources
        self._versions: dict[str, str] = {}
        self._tasks: dict[ServedModel, asyncio.Task[None]] = {}
        torch.set_num_threads(CPU_THREADS)

    def load(self) -> Self:
        """Load all models.

        Raises:
            UserError: a checkpoint is missing or damaged, or the memory does not suffice.
        """
        for source in self._sources:
            self._versions[source.name] = source.version()
            self.models[source.name] = self._load(source.name, source.fetch())
        return self

    def get(self, name: str | None) -> ServedModel:
        """A model by its name, or the default.

        Raises:
            RequestError: there is no such model.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            known = ", ".join(self.models)
            message = f"model: expected one of {known}, found {name!r}"
            raise RequestError(404, message, param="model", code="model_not_found")
        return self.models[name]

    def count(self, state: Literal["running", "waiting"]) -> int:
        """The number of sequences in this state."""
        return sum(len(getattr(model.engine, state)) for model in self.models.values())

    async def run(self, watch_s: float | None) -> None:
        """Run the engines until this task is cancelled, and replace models that change.

        Args:
            watch_s: time between two looks at the sources; None: do not look.
        """
        async with AsyncExitStack() as stack:
            stack.callback(self.executor.shutdown, wait=False, cancel_futures=True)
            group = await stack.enter_async_context(asyncio.TaskGroup())
            for model in self.models.values():
                self._tasks[model] = group.create_task(model.engine.run())
            while True:
                await asyncio.sleep(watch_s or 3600)
                for source in self._sources if watch_s else []:
                    await self._replace_if_new(source, group)

    async def _replace_if_new(self, source: Source, group: asyncio.TaskGroup) -> None:
        """Load a new version beside the old one, which then finishes its requests; keep the old one if that fails."""
        try:
            version = await asyncio.to_thread(source.version)
            if version == self._versions[source.name]:
                return
            path = await asyncio.to_thread(source.fetch)
            self._versions[source.name] = version
            model = await asyncio.to_thread(self._load, source.name, path)
        except (OneLineError, OSError) as error:
            log.warning("%s: the model in use stays: %s", source.name, error)
            return
        old, self.models[source.name] = self.models[source.name], model
        self._tasks[model] = group.create_task(model.engine.run())
        group.create_task(self._retire(old))
        log.info("%s: replaced by SHA-256 %s", source.name, model.sha256[:8])

    async def _retire(self, model: ServedModel) -> None:
        await model.engine.drained()
        self._tasks.pop(model).cancel()

    def _load(self, name: str, path: Path) -> ServedModel:
        checkpoint, sha256 = load_checkpoint(path), sha256_file(path)
        needed = decoding_memory(
            checkpoint, {"--max-batch-size": self._sizes["max_batch_size"]}, checkpoint.model.block_size
        )
        check_memory("server", needed, torch.device("cpu"))
        module = checkpoint.build()
        engine = Engine(module, self.executor, **self._sizes)
        log.info("%s: SHA-256 %s", name, sha256[:8])
        return ServedModel(name, checkpoint, sha256, engine, module)
