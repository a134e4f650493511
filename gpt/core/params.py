"""Strict reading of params files: every key is required, unknown keys are errors, errors name the key."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from gpt.core.errors import UserError, without_secrets
from gpt.core.files import sha256_file

# The bounds of a kind of value: single precision can divide by such a number, a seed can be added to.
Seed = Annotated[int, Field(ge=0, lt=1 << 53)]
Count = Annotated[int, Field(ge=1, le=10**9)]
PositiveFloat = Annotated[float, Field(ge=1e-12, le=1e12)]
Probability = Annotated[float, Field(ge=1e-12, le=1)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$", to_lower=True)]  # SHA-256
MAX_TIMEOUT_S = 100_000  # ten times as many milliseconds, the longest wait of 1024 processes, fit into 32 bits

UNPARSABLE = (YAMLError, ValueError, RecursionError)  # of the parser, for a date such as 2026-99-99 and deep nesting
MAX_BYTES = 100_000  # of a params file; parsing a large one takes minutes


class Section(BaseModel):
    """A section of the params file: its keys, their types and bounds."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class InitSection(Section):
    """A section of a stage that can start from a file of an earlier run, pinned by its SHA-256."""

    init_from: str | None = Field(min_length=1)
    init_sha256: Digest | None

    @model_validator(mode="after")
    def _digest_is_given(self) -> Self:
        if self.init_from and not self.init_sha256:
            path = Path(self.init_from)
            value = sha256_file(path) if path.is_file() else f"the one that `sha256sum {path}` prints"
            raise ValueError(f"init_sha256: expected the SHA-256 of {path}, found null; set it to {value}")
        return self

    def init_file(self, section: str, remedy: str) -> Path | None:
        """The path `init_from`, after verification of its SHA-256; None if it is null.

        Args:
            remedy: where such a file comes from.

        Raises:
            UserError: there is no such file, or its content is another one.
        """
        if not self.init_from:
            return None
        path = Path(self.init_from)
        if not path.is_file():
            raise UserError(
                f"{section}.init_from: found no file {path} in {Path.cwd()}; {remedy}, and give the absolute path, "
                "which experiments with --temp and --queue need, or set it to null"
            )
        if (found := sha256_file(path)) != self.init_sha256:
            raise UserError(
                f"{section}.init_from: expected {path} with the SHA-256 {self.init_sha256}, found {found}; restore the "
                f"file, or start from the new one with -S {section}.init_sha256={found}"
            )
        return path


S = TypeVar("S", bound=Section)


def read_section(path: Path, name: str, section: type[S], changes: Sequence[str] = ()) -> S:
    """Read and check the section `name` of a params file.

    Args:
        changes: `section.key=value` texts that override the file; those of other sections are ignored.

    Raises:
        UserError: the file, the section or a key is missing, unknown, duplicated or of the wrong type.
    """
    return check_section(path, name, section, read_params(path, changes))


def read_params(path: Path, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Read a whole params file as plain values with `changes` applied; its sections are not checked."""
    if path.is_file() and (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(
            f"{path}: expected a params file of at most {MAX_BYTES:,} bytes, found {size:,}; correct the path"
        )
    try:
        params = _yaml().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: expected a params file, found no file; start from one in presets/") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8, found {error.reason} at byte {error.start:,}; convert it") from None
    except UNPARSABLE as error:
        raise UserError(f"{path}: expected YAML: {_yaml_problem(error)}; correct that line") from None
    if not isinstance(params, dict):
        raise UserError(
            f"{path}: expected a mapping of sections, found {_shown(params)}; start from a file in presets/"
        )
    for change in changes:
        _apply(params, change)
    return params


def check_section(path: Path, name: str, section: type[S], params: Mapping[str, Any]) -> S:
    """Check one section of the params that `read_params` returned."""
    if name not in params:
        near = suggestion(name, params)
        raise UserError(f"{path}: {name}: this section is missing{near}; copy it from a file in presets/")
    if not isinstance(params[name], dict):
        raise UserError(f"{path}: {name}: expected a section of keys, found {_shown(params[name])}")
    for key in section.model_fields:
        if key not in params[name]:  # also keys with a default, which applies to commands without a params file
            raise UserError(f"{path}: {name}.{key}: this key is missing; copy it from a file in presets/")
    try:
        return section.model_validate(params[name])
    except ValidationError as error:
        found = error.errors(include_url=False)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"{path}: {_explain(name, section, found[0])}{more}") from None


def suggestion(name: object, known: Mapping[Any, Any]) -> str:
    """Return `; did you mean 'x'?` if a known name is similar, else an empty string."""
    near = difflib.get_close_matches(str(name), map(str, known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)  # YAML 1.2, as DVC reads it: 1e-3 is a number, `no` is a string


def _apply(params: dict[str, Any], change: str) -> None:
    """Set one key from a text `section.key=value`, whose value is YAML."""
    target, equals, value = change.partition("=")
    section, dot, key = target.strip().partition(".")
    if not (equals and dot and section and key):
        raise UserError(f"--set {change}: expected SECTION.KEY=VALUE, for example train.max_steps=100")
    if not isinstance(params.get(section), dict):
        raise UserError(f"--set {target}: no section '{section}' in the params file{suggestion(section, params)}")
    if key not in params[section]:
        raise UserError(f"--set {target}: unknown key{suggestion(key, params[section])}")
    try:
        params[section][key] = _yaml().load(value) if value.strip() else ""
    except UNPARSABLE as error:
        raise UserError(f"--set {target}: expected a value in YAML: {_yaml_problem(error)}") from None


def _explain(name: str, section: type[Section], error: ErrorDetails) -> str:
    key = ".".join([name, *map(str, error["loc"])])
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{suggestion(str(error['loc'][-1]), section.model_fields)}"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{key}: {message}" if error["loc"] else f"{name}.{message}"
    expected = re.sub(r"^\w+ should (be|have|match) ", "", error["msg"])
    remedy = f"correct it there or with -S {name}.{error['loc'][0]}=VALUE"
    return f"{key}: expected {expected}, found {_shown(error['input'])}; {remedy}"


def _shown(value: object) -> str:
    """A value as in YAML, without passwords; a section by the number of its keys."""
    if isinstance(value, dict):
        return f"a section of {len(value)} keys"
    return "null" if value is None else without_secrets(repr(value))


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return " ".join(str(error).split())
