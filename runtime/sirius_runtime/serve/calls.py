"""Turns a request into answers of the engine, and the answers' events into OpenAI's objects.

A `Call` is made, submitted and read in the event loop's thread; the engine adds events from its own
thread.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers import Tokenizer

from sirius_runtime.errors import GenerationError, UserError
from sirius_runtime.logits_options import TokenLogprobs
from sirius_runtime.model import SiriusModel
from sirius_runtime.request import FinishReason, Mode, Options
from sirius_runtime.rules import RULES, RuleNumbers
from sirius_runtime.serve.answers import Answer, ClosingError, DeadlineError, News
from sirius_runtime.serve.engine import Engine, OverloadedError
from sirius_runtime.serve.protocol import (
    MOST_LOGPROBS,
    ApiError,
    ChatRequest,
    CompletionRequest,
)
from sirius_runtime.text import TextStream
from sirius_runtime.tokenizer_guard import panics_caught

Kind = Literal["chat", "text"]
_REASONS = {FinishReason.EOS: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


@dataclass(frozen=True)
class Defaults:
    """The values for fields that a request leaves out: the mode of greedy requests, the time limit
    in seconds (also the largest that a request may ask for), and the n of prompt lookup's n-grams.
    """

    mode: str
    timeout: float
    lookup: int | None = None


@dataclass
class Choice:
    """An answer as its client sees it: its text and log-probabilities so far. fresh: pieces of text
    that `stream` has written and `take` has not returned yet.
    """

    index: int
    answer: Answer
    stream: TextStream
    fresh: list[str]
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: FinishReason | None = None

    def take(self, news: News) -> str:
        """Adds an event; returns the new text."""
        with panics_caught():
            self.stream.put(list(news.tokens))
            if news.last:
                self.stream.end()
        text, self.fresh[:] = "".join(self.fresh), []
        self.text += text
        self.logprobs += news.logprobs
        self.reason = news.reason
        return text


class Call:
    """A request in progress: its answers, and a queue of their events."""

    def __init__(
        self, kind: Kind, name: str, engine: Engine, asked: ChatRequest | CompletionRequest
    ) -> None:
        self.asked = asked
        self._kind, self._name, self._engine = kind, name, engine
        self._id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._news: asyncio.Queue[tuple[Choice, News]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.choices: list[Choice] = []

    def add(self, tokenizer: Tokenizer, prompt: Sequence[int], **fields: Any) -> None:
        """Adds an answer; `fields`: the other fields of `Answer`."""
        fresh: list[str] = []

        def listen(news: News) -> None:
            self._loop.call_soon_threadsafe(self._news.put_nowait, (choice, news))

        answer = Answer(prompt=prompt, listen=listen, tokenizer=tokenizer, **fields)
        stream = TextStream(tokenizer, fresh.append, answer.request.stop)
        stream.put(list(prompt))
        choice = Choice(len(self.choices), answer, stream, fresh)
        self.choices.append(choice)

    def submit(self) -> None:
        """Hands the answers to the engine. Raises ApiError if it is overloaded or stopping."""
        try:
            self._engine.submit([choice.answer for choice in self.choices])
        except OverloadedError as error:
            raise ApiError(429, str(error), code="overloaded", retry_after=error.seconds) from error
        except ClosingError as error:
            raise _as_api_error(error) from error

    def cancel(self) -> None:
        """Cancels the answers that are not complete."""
        self._engine.cancel([c.answer for c in self.choices if c.reason is None])

    async def _read(self) -> AsyncIterator[tuple[Choice, News, str]]:
        """The events with their new texts, until all answers have ended. Raises ApiError if an
        answer fails.
        """
        going = len(self.choices)
        while going:
            choice, news = await self._news.get()
            if news.error is not None:
                raise _as_api_error(news.error) from news.error
            yield choice, news, choice.take(news)
            going -= news.last

    async def whole(self) -> dict[str, Any]:
        """The response to a request that does not stream."""
        async for _ in self._read():
            pass
        choices = []
        for choice in self.choices:
            one = self._choice(choice, choice.text, choice.logprobs)
            if self._kind == "chat":
                one["message"] = {"role": "assistant", "content": one.pop("text")}
            choices.append(one)
        return self._object("" if self._kind == "chat" else None, choices) | {
            "usage": self._usage()
        }

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The objects of a streamed response; if an answer fails, the error is the last one."""
        usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        nothing = {"usage": None} if usage else {}
        if self._kind == "chat":
            for choice in self.choices:
                first = {"role": "assistant", "content": ""}
                yield self._chunk(choice.index, {"delta": first}, None) | nothing
        try:
            async for choice, news, text in self._read():
                if not (text or news.last or news.logprobs):
                    continue
                one = self._choice(choice, text, news.logprobs)
                if self._kind == "chat":
                    one["delta"] = {"content": text} if text else {}
                    del one["text"]
                yield self._object(".chunk" if self._kind == "chat" else None, [one]) | nothing
        except ApiError as error:
            self.cancel()
            yield error.body
            return
        if usage:
            yield self._object(".chunk" if self._kind == "chat" else None, []) | {
                "usage": self._usage()
            }

    def _chunk(self, index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        one = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return self._object(".chunk", [one])

    def _object(self, suffix: str | None, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion" if suffix is None else f"chat.completion{suffix}",
            "created": self._created,
            "model": self._name,
            "choices": choices,
        }

    def _choice(
        self, choice: Choice, text: str, logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, Any]:
        entries = None
        if self.asked.told_logprobs is not None:
            entries = _logprobs(self._kind, choice, logprobs, self.asked.told_logprobs)
        reason = None if choice.reason is None else _REASONS[choice.reason]
        return {"index": choice.index, "text": text, "logprobs": entries, "finish_reason": reason}

    def _usage(self) -> dict[str, Any]:
        """OpenAI's `usage`, with our drafted_tokens and accepted_tokens."""
        answers = [choice.answer for choice in self.choices]
        # The prompt of n choices counts once.
        prompts = {id(a.prompt): a for a in reversed(answers)}.values()
        prompt = sum(len(answer.prompt) for answer in prompts)
        new = sum(len(answer.row.tokens) for answer in answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(a.cached for a in prompts)},
            "drafted_tokens": sum(answer.drafted for answer in answers),
            "accepted_tokens": sum(answer.accepted for answer in answers),
        }


@panics_caught()
def make_call(
    model: SiriusModel,
    name: str,
    engine: Engine,
    defaults: Defaults,
    asked: ChatRequest | CompletionRequest,
    prompts: Sequence[tuple[int, ...]],
) -> Call:
    """The call for a request: `n` answers per prompt. Raises ApiError if it can't be served."""
    capacity, n = engine.capacity, asked.n or 1
    kind: Kind = "chat" if isinstance(asked, ChatRequest) else "text"
    if asked.period is not None and asked.period > capacity.period:
        raise ApiError(
            400, f"period must be in 1..{capacity.period} here, got {asked.period}", param="period"
        )
    if n * len(prompts) > capacity.rows + capacity.queue:
        raise ApiError(
            400,
            f"{len(prompts)} prompts with n = {n} make {n * len(prompts)} answers, but the server "
            f"holds at most {capacity.rows + capacity.queue}: send several smaller requests",
            param="n",
        )
    call = Call(kind, name, engine, asked)
    seconds = min(asked.timeout or defaults.timeout, defaults.timeout)
    deadline = time.monotonic() + seconds
    most_logprobs = min(MOST_LOGPROBS, model.program.model.vocab_size)
    streams = model.backend.stream_seconds > 0.0
    assert model.tokenizer is not None
    for prompt in prompts:
        room = capacity.context - len(prompt)
        wanted = asked.most_tokens if asked.most_tokens is not None else max(room, 1)
        if wanted > room:
            raise ApiError(
                400,
                f"the prompt's {len(prompt)} tokens and the answer's {wanted} are more than this "
                f"server's context of {capacity.context}: shorten the prompt, or lower max_tokens",
                code="context_length_exceeded",
                param="messages" if kind == "chat" else "prompt",
            )
        try:
            request = model.request(
                options_of(asked, defaults, most_logprobs, streams),
                [len(prompt)] * n,
                wanted,
                stop=asked.stop,
            )
        except UserError as error:
            raise ApiError(400, str(error)) from error
        seeds = request.seeds or (None,) * n
        for seed in seeds:
            call.add(model.tokenizer, prompt, request=request, seed=seed, deadline=deadline)
    return call


def options_of(
    asked: ChatRequest | CompletionRequest, defaults: Defaults, most_logprobs: int, streams: bool
) -> Options:
    """The request's mode and sampling fields as options of `generate`.

    Without a mode, a temperature above 0 asks for sampling, and 0 or none for greedy decoding. The
    seed of a greedy request is ignored. most_logprobs: how many log-probabilities the engine
    computes if any are asked for, so that requests for different numbers share a batch. streams:
    whether the weights are streamed from the file; a dense step is never faster then. Raises
    ApiError for a sampling mode with temperature 0.
    """
    temperature = asked.temperature
    mode = asked.mode
    if mode is None:
        mode = Mode.SAMPLE if temperature else defaults.mode
    draws = mode in RULES and RULES[mode].draws
    if temperature == 0.0:
        if draws:
            raise ApiError(
                400,
                f"mode {mode} samples, which a temperature of 0 rules out: use mode exact, or a "
                "temperature above 0",
                param="temperature",
            )
        temperature = None
    greedy = temperature is None and not draws
    rule: RuleNumbers = {} if asked.threshold is None else {"threshold": asked.threshold}
    return Options(
        mode=mode,
        rule=rule,
        period=asked.period,
        fallback=False if streams else None,
        lookup=defaults.lookup if asked.lookup is None else asked.lookup,
        temperature=temperature,
        top_p=None if greedy and asked.top_p == 1.0 else asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=None if greedy else asked.seed,
        logprobs=None if asked.told_logprobs is None else most_logprobs,
    )


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, DeadlineError):
        return ApiError(504, "the request exceeded its time limit", code="deadline_exceeded")
    if isinstance(error, ClosingError):
        return ApiError(503, str(error), code="stopping")
    return ApiError(500, f"the answer failed: {error}", code="internal_error")


def encode(model: SiriusModel, asked: ChatRequest | CompletionRequest) -> list[tuple[int, ...]]:
    """The token ids of a request's prompts. Raises ApiError for a prompt that is not valid."""
    try:
        if isinstance(asked, CompletionRequest):
            return list(model.encode(asked.prompt))
        if model.chat is None:
            raise GenerationError(
                "this model has no chat template: use /v1/completions with a prompt"
            )
        text = model.chat.render(asked.messages, **(asked.chat_template_kwargs or {}))
        return list(model.encode(text, add_special_tokens=False))
    except UserError as error:
        param = "prompt" if isinstance(asked, CompletionRequest) else "messages"
        raise ApiError(400, str(error), param=param) from error


def _logprobs(
    kind: Kind, choice: Choice, logprobs: Sequence[TokenLogprobs], count: int
) -> dict[str, Any]:
    tokenizer = choice.answer.tokenizer
    assert tokenizer is not None

    def name(token: int) -> str:
        return tokenizer.decode([token], skip_special_tokens=False)

    if kind == "text":
        return {
            "tokens": [name(one.token) for one in logprobs],
            "token_logprobs": [_finite(one.logprob) for one in logprobs],
            "top_logprobs": [{name(t): _finite(v) for t, v in one.top[:count]} for one in logprobs],
            "text_offset": None,
        }

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = name(token)
        whole = "\ufffd" not in text  # else the token is a part of a character of unknown bytes
        return {
            "token": text,
            "logprob": _finite(logprob),
            "bytes": list(text.encode()) if whole else None,
        }

    content = [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(*top) for top in one.top[:count]]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    """The log-probability, at least -9999: JSON has no infinity, and OpenAI uses this number."""
    return max(logprob, -9999.0)
