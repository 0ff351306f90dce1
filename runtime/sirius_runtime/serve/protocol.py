"""The requests and errors of OpenAI's API.

Unknown fields are refused by name: ignoring one would return an answer that was not asked for.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_LOGPROBS = 20
"""The largest `top_logprobs`, as in OpenAI's API."""
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A refused request: HTTP status, message, OpenAI's error code, and the field at fault.

    retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers of the error response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class Strict(BaseModel):
    """A model that refuses unknown fields and wrong types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class ResponseFormat(Strict):
    """OpenAI's `response_format`; only text is supported."""

    type: Literal["text"]


class Asked(Strict):
    """The fields that both kinds of request have.

    mode, threshold, period, lookup, top_k, min_p: as in `SiriusModel.generate`. timeout: time limit
    in seconds, at most the server's.
    """

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = None
    max_tokens: int | None = Field(None, ge=1)
    user: str | None = None
    # Only OpenAI's defaults are accepted, because clients send them on their own.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    # Not in OpenAI's API
    mode: str | None = None
    threshold: float | None = None
    period: int | None = Field(None, ge=1)
    lookup: int | None = Field(None, ge=0)
    top_k: int | None = None
    min_p: float | None = None
    timeout: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, given: Any) -> Any:
        """Accepts a penalty of 0.0 as 0: JSON does not tell them apart."""
        if isinstance(given, dict):
            for name in ("frequency_penalty", "presence_penalty"):
                value = given.get(name)
                if isinstance(value, float) and value == 0:
                    given = {**given, name: 0}
        return given

    @model_validator(mode="after")
    def _options_of_streams(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError(
                "stream_options needs stream=true: set it, or leave stream_options out"
            )
        return self


class ChatRequest(Asked):
    """A request to `/v1/chat/completions`. chat_template_kwargs: variables of the model's template
    (`enable_thinking`, …).
    """

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true: set that, or leave this out")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same: give one of them")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The answer's greatest length in tokens; None for as many as the context allows."""
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def told_logprobs(self) -> int | None:
        """How many of the likeliest tokens' log-probabilities to return with each token's own;
        None: no log-probabilities at all.
        """
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Asked):
    """A request to `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    @property
    def most_tokens(self) -> int | None:
        """The answer's greatest length in tokens; 16 by default, as in OpenAI's API."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def told_logprobs(self) -> int | None:
        """As in `ChatRequest`."""
        return self.logprobs
