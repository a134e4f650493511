"""The checkpoint format: a damaged file is refused, and loading never runs code.

A file is the output of `torch.save` followed by a trailer with the SHA-256 of all bytes before it; `torch.load` ignores
the trailer. The content is plain tensors and one canonical JSON string, and is loaded with `weights_only=True`.
"""

import hashlib
import io
import json
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gpt.core.errors import UserError
from gpt.core.files import atomic_write, canonical_json
from gpt.model.baselines import make_model
from gpt.model.config import ModelConfig
from gpt.model.gpt import LanguageModel
from gpt.model.memory import check_memory, position_tables, weights
from gpt.tokenizers import tokenizer_from_json
from gpt.tokenizers.base import Tokenizer

FORMAT = 1
ADDED_KEYS = {"ngram_dropout": 0.0}  # of the model; earlier checkpoints lack them
TRAILER = b"\nchargpt sha256 "  # then 64 hexadecimal digits and a line feed
TRAILER_LENGTH = len(TRAILER) + 64 + 1
MAX_REASON, MAX_LISTED = 300, 5  # characters, and weights, in an error message
PLAIN_TYPES = re.compile(r"torch\._utils _rebuild_tensor_v2|collections OrderedDict|torch [A-Za-z0-9]+Storage")


class _Origin(BaseModel):
    """The part of `about` that others read."""

    model_config = ConfigDict(extra="allow", strict=True)

    corpus_sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with its tokenizer and its origin.

    `model` is the model's configuration. `about` holds the training params, the SHA-256 of the corpus, the step and the
    validation loss.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    weights: Mapping[str, Tensor]
    about: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically; equal contents give equal bytes."""
        metadata = {"model": self.model.model_dump(), "tokenizer": self.tokenizer.to_json(), "about": dict(self.about)}
        write_tensors(path, metadata, {"weights": dict(self.weights)})

    def build(self) -> LanguageModel:
        """Construct the model with these weights, on the CPU and in evaluation mode."""
        model = _make_empty_model(self.model, self.tokenizer)
        model.load_state_dict(dict(self.weights))
        return model.eval()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and validate every part of it.

    Raises:
        UserError: the file is missing, damaged or of another format, or its content is not valid.
    """
    metadata, tensors = read_tensors(path)
    try:
        config = ModelConfig.model_validate(ADDED_KEYS | metadata["model"])
        tokenizer = tokenizer_from_json(metadata["tokenizer"])
        found, about = dict(tensors["weights"]), _Origin.model_validate(metadata["about"])
        sizes = [*weights(config, tokenizer.vocab_size), *position_tables(config)]
        check_memory("model", sizes, torch.device("cpu"))
        difference = _difference(_make_empty_model(config, tokenizer).state_dict(), found)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, UserError) as error:
        reason = "; ".join(str(error).splitlines())
        raise UserError(f"{path}: expected a trained model, found no valid {reason}; train again") from None
    if difference:
        raise UserError(f"{path}: weights do not match the model configuration in the file: {difference}; train again")
    if unusable := [name for name, weight in found.items() if not weight.isfinite().all()]:
        raise UserError(f"{path}: expected finite weights, found NaN or infinite ones in {unusable[0]}; train again")
    return Checkpoint(config, tokenizer, found, about.model_dump())


def write_tensors(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write metadata and nested dicts of tensors atomically."""
    buffer = io.BytesIO()  # not a path: torch.save writes the stem of a path into the file
    torch.save({"format": FORMAT, "metadata": canonical_json(metadata), **tensors}, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())
        file.write(TRAILER + hashlib.sha256(buffer.getbuffer()).hexdigest().encode() + b"\n")


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a file of `write_tensors`: the metadata and the tensors.

    Raises:
        UserError: the file is missing, of another format or damaged, or holds more than plain tensors.
    """
    content = _verified_content(path)
    try:
        _check_archive(content)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of any type, if the file was made to cause it
        reason = " ".join(str(error).split())[:MAX_REASON]
        raise UserError(
            f"{path}: expected plain tensors, found other objects, which were not loaded ({reason})"
        ) from None
    version = loaded.pop("format", None) if isinstance(loaded, dict) else None
    if version != FORMAT:
        raise UserError(f"{path}: expected a checkpoint of format {FORMAT}, found {version or 'none'}; train again")
    try:
        text = loaded.pop("metadata")
        metadata = json.loads(text)
    except (KeyError, TypeError, ValueError, RecursionError):
        metadata, text = None, ""
    if not isinstance(metadata, dict) or canonical_json(metadata) != text:  # for example with duplicate keys
        raise UserError(f"{path}: expected metadata as canonical JSON, found none; train again")
    return metadata, loaded


def _check_archive(content: bytes) -> None:
    """Refuse what `torch.save` does not write and what could take much memory to load.

    `weights_only=True` allows, for example, a `bytearray` of any length, and archives may be compressed.

    Raises:
        ValueError: the archive is larger than its file, or its pickle names other types than tensors.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > len(content) or any(m.compress_type for m in members):
            raise ValueError("a compressed archive")
        (pickled,) = (archive.read(member) for member in members if member.filename.endswith("/data.pkl"))
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not PLAIN_TYPES.fullmatch(str(argument)):
            raise ValueError(f"the type {argument}")


def _verified_content(path: Path) -> bytes:
    """The bytes of a file without its trailer, if their SHA-256 is the one in the trailer."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: expected a checkpoint, found: {error.strerror}; train one or correct the path"
        ) from None
    content, trailer = data[:-TRAILER_LENGTH], data[-TRAILER_LENGTH:]
    if not trailer.startswith(TRAILER):
        raise UserError(
            f"{path}: expected a checkpoint that ends with its SHA-256, found {len(data):,} bytes without one; "
            "it is truncated or not a checkpoint of this project: train again or restore it with dvc checkout"
        )
    stated, digest = trailer[len(TRAILER) :].decode("ascii", "replace"), hashlib.sha256(content).hexdigest()
    if stated != f"{digest}\n":
        raise UserError(
            f"{path}: expected SHA-256 {stated[:64]}, found {digest}; the file is damaged: "
            "train again or restore it with dvc checkout"
        )
    return content


def _make_empty_model(config: ModelConfig, tokenizer: Tokenizer) -> LanguageModel:
    """Construct a model whose weights have no values: their memory is never touched, whatever size the file claims.

    (Torch's meta device would do as well, but imports torch's compiler, which takes a second.)
    """
    with _SkipWeightInit():
        return make_model(config, tokenizer.vocab_size)


class _SkipWeightInit(TorchFunctionMode):
    """Skips the functions of `torch.nn.init`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The differences in names, types and shapes between two sets of weights; empty if there are none."""
    wanted, got = ({name: _describe(tensor) for name, tensor in weights.items()} for weights in (expected, found))
    names = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    more = [f"and {len(names) - MAX_LISTED} more"] if len(names) > MAX_LISTED else []
    shown = [
        f"{name}: expected {wanted.get(name, 'none')}, found {got.get(name, 'none')}" for name in names[:MAX_LISTED]
    ]
    return "; ".join([*shown, *more]).replace("\n", "\\n")


def _describe(weight: Tensor) -> str:
    """Type and shape, and what else must be the same for two tensors to be interchangeable."""
    special = [
        str(found) for found in (weight.layout, weight.device.type) if str(found) not in ("torch.strided", "cpu")
    ]
    return " ".join([str(weight.dtype), str(list(weight.shape)), *special])
