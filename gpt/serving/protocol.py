"""Requests and responses: OpenAI's completions, and what the page asks for."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from gpt.core.errors import printable
from gpt.core.params import Seed
from gpt.generation.sampling import SamplingParams

MAX_CHOICES, MAX_PROMPTS, MAX_STOPS, MAX_TOP = 16, 64, 16, 20
DEFAULT_MAX_TOKENS = 16  # as in OpenAI's API

Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class RequestError(Exception):
    """An error in OpenAI's form.

    Args:
        kind: OpenAI's `type`.
        param: the field of the request.
        code: OpenAI's machine-readable `code`.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        error = {"message": printable(message), "type": kind, "param": printable(param) if param else None}
        self.content = {"error": {**error, "code": code}}
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}


class _Body(BaseModel):
    """A JSON object without unknown fields. A whole number is accepted for a float."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class SamplingFields(_Body):
    """The sampling settings; defaults and bounds are those of `gpt generate`."""

    model: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @model_validator(mode="after")
    def _in_bounds(self) -> Self:
        self.sampling()
        return self

    def sampling(self) -> SamplingParams:
        """The settings of this request; null stands for the default."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if given.get("top_p") == 0:
            raise ValueError("top_p: expected more than 0; take temperature 0 for greedy decoding")
        try:
            return SamplingParams.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ValueError(f"{first['loc'][0]}: {first['msg']}") from None


class StreamOptions(_Body):
    """OpenAI's options of a stream."""

    include_usage: bool = False


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)] = ""
    max_tokens: int | None = Field(default=None, ge=0)
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    echo: bool | None = None
    user: str | None = None  # accepted, and ignored

    @property
    def prompts(self) -> list[str]:
        """The prompts."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def max_new_tokens(self) -> int:
        """The number of tokens after which a text ends."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TextRequest(SamplingFields):
    """The body of `POST /explore/next`."""

    text: str


class InsideRequest(_Body):
    """The body of `POST /explore/inside`; layer and head are counted from 1."""

    model: str | None = None
    text: str
    layer: int = Field(default=1, ge=1)
    head: int = Field(default=1, ge=1)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """OpenAI's count of tokens."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
