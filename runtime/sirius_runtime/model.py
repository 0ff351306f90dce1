"""`SiriusModel`: a loaded program with `generate`, under transformers' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack, cast

from tokenizers import Tokenizer

from sirius_runtime.chat import NO_TEMPLATE, Chat, conversations
from sirius_runtime.decoder import Backend, Decoder
from sirius_runtime.errors import GenerationError, shown
from sirius_runtime.forking import check_threads_live, ran_on
from sirius_runtime.generation import Generation, Streamer
from sirius_runtime.guard import Costs
from sirius_runtime.logits_options import LogitsOptions, LogitsProcessor, TokenLogprobs
from sirius_runtime.prefix import Prefix
from sirius_runtime.prompts import Prompt, PromptReader, is_text, read_ids
from sirius_runtime.request import (
    FinishReason,
    Mode,
    Options,
    Request,
    read_options,
)
from sirius_runtime.rules import OPTIONS, RuleNumbers
from sirius_runtime.scores import TokenScores, score
from sirius_runtime.spec import ProgramSpec
from sirius_runtime.state import State
from sirius_runtime.stats import GenerationStats, PhaseClock, RowSteps
from sirius_runtime.text import answer_text
from sirius_runtime.tokenizer_guard import panics_caught
from sirius_runtime.trace import Trace, Tracing, check_traceable
from sirius_runtime.watched_file import WatchedFile

if TYPE_CHECKING:
    from sirius_runtime.chat import Messages
    from sirius_runtime.prompts import Array, Ids, Inputs

__all__ = [
    "FinishReason",
    "GenerationOutput",
    "LogitsOptions",
    "LogitsProcessor",
    "Mode",
    "Prompt",
    "SiriusModel",
    "Streamer",
    "TokenLogprobs",
    "Trace",
    "Tracing",
]


@dataclass(frozen=True)
class GenerationOutput:
    """The result of `generate`. `tokens` and `texts` hold each row's answer, without the prompt.

    A row that ended by an EOS token or a stop string keeps it at the end of its tokens. Its text
    ends before the stop string and has no special tokens. A text continues its prompt's text, so a
    space between them is the first character of the answer. `texts` is None for a model without a
    tokenizer. `seeds`: each row's seed, to draw the same tokens again; None where nothing was
    drawn. `logprobs`: log-probabilities of `tokens`; None where not asked for. `steps`: how each
    row's tokens were decoded, period by period. `trace`: the drafts, verdicts and commits of each
    period; None where not asked for.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...] | None
    finish_reasons: tuple[FinishReason, ...]
    seeds: tuple[int, ...] | None
    stats: GenerationStats
    logprobs: tuple[tuple[TokenLogprobs, ...], ...] | None = None
    steps: tuple[RowSteps, ...] = ()
    trace: Trace | None = None


class MoreOptions(LogitsOptions, RuleNumbers):
    """The options of `generate` that are defined in tables: `LogitsOptions` and `RuleNumbers`."""


class SiriusModel:
    """A loaded model, which generates by its back end."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer | None,
        file: WatchedFile | None = None,
        chat: Chat | None = None,
    ) -> None:
        """file: the mapped file, where weights are used in place; it must not change. chat: the
        chat templates, if the model has any.
        """
        self.backend = backend
        self.tokenizer = tokenizer
        self.chat = chat
        self._file = file
        self._costs: dict[int, Costs] = {}
        self._prompts = PromptReader(tokenizer, backend.program.model.vocab_size)

    @property
    def program(self) -> ProgramSpec:
        """The artifact's description of the program."""
        return self.backend.program

    def costs(self, rows: int) -> Costs:
        """The measured times of periods with so many rows; generations add to them."""
        return self._costs.setdefault(rows, Costs(self.program.sparsity.density))

    @panics_caught()
    def encode(
        self,
        inputs: Inputs | None = None,
        *,
        messages: Messages | None = None,
        add_special_tokens: bool = True,
    ) -> tuple[tuple[int, ...], ...]:
        """The token ids of one prompt or several, as `generate` reads them."""
        if messages is not None:
            inputs, add_special_tokens = self._render(messages, None, None), False
        rows = self._prompts.read(inputs, add_special_tokens=add_special_tokens)
        return tuple(map(tuple, rows))

    @panics_caught()
    def prefix(self, inputs: Inputs, *, add_special_tokens: bool = True) -> Prefix:
        """Runs one prompt and returns its K/V, for prompts that begin with it: see the option
        `prefix` of `generate`.
        """
        rows = self._prompts.read(inputs, add_special_tokens=add_special_tokens)
        if len(rows) != 1:
            raise GenerationError(f"a prefix is one prompt, got {len(rows)}; give one")
        state = self._open(1, len(rows[0])).state
        with state.computing():
            return state.prefix(rows[0])

    @panics_caught()
    def score(
        self, inputs: Inputs, *, start: int | Sequence[int] = 1, add_special_tokens: bool = True
    ) -> tuple[TokenScores, ...]:
        """The full path's log-probability of each token of one text or several, given the tokens
        before it; and whether the token is the likeliest.

        start: index of the first token that is scored, for all rows or for each; at least 1,
        because the first token has none before it. Raises GenerationError for a row that is too
        long, or shorter than `start`.
        """
        rows = self._prompts.read(inputs, add_special_tokens=add_special_tokens)
        starts = [start] * len(rows) if isinstance(start, int) else list(start)
        if len(starts) != len(rows):
            raise GenerationError(
                f"start has {len(starts)} numbers for {len(rows)} rows; give one number, or one "
                "per row"
            )
        for index, (row, first) in enumerate(zip(rows, starts, strict=True)):
            if not 1 <= first <= len(row):
                raise GenerationError(
                    f"start must be in 1..{len(row)} for row {index}, which has {len(row)} tokens, "
                    f"got {first}"
                )
        # The last token of a row is scored but not run.
        state = self._open(len(rows), max(2, *map(len, rows)) - 1).state
        with state.computing():
            return score(state, rows, starts)

    def state(self, tokens: int) -> State:
        """An empty state of one row with room for `tokens` tokens (at least 2), for callers that
        run entries themselves.
        """
        return self._open(1, tokens - 1).state

    def _open(self, rows: int, tokens: int) -> Decoder:
        """A decoder of the full path for rows of so many tokens, after the checks of `generate`."""
        self.check()
        request = read_options(
            Options(mode=Mode.FULL),
            self.program,
            self.backend.limits,
            prompt_lengths=[tokens] * rows,
            max_new_tokens=1,
            eos=frozenset(),
            stop=(),
        )
        ran_on(self.backend.threads)
        return self.backend.open(request, rows, tokens + 1, PhaseClock(self.backend.device))

    @panics_caught()
    def generate(
        self,
        inputs: Inputs | None = None,
        *,
        input_ids: Ids | None = None,
        attention_mask: Ids | None = None,
        token_type_ids: Ids | None = None,
        messages: Messages | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_special_tokens: bool = True,
        max_new_tokens: int | None = None,
        mode: Mode | str | None = None,
        period: int | str | None = None,
        tree_width: int | None = None,
        confidence: float | None = None,
        refresh: int | None = None,
        fallback: bool | None = None,
        lookup: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        typical_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        stop: str | Sequence[str] | None = None,
        eos_token_id: int | Sequence[int] | Array | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = (),
        logprobs: int | None = None,
        streamer: Streamer | None = None,
        prefix: Prefix | None = None,
        trace: bool | Tracing = False,
        **more: Unpack[MoreOptions],
    ) -> GenerationOutput:
        """Generates from one prompt or a batch.

        inputs: text, token ids, a list of either, an array of ids [T] or [B, T], or a tokenizer's
        output: a mapping with input_ids, and attention_mask where rows are padded, left or right.
        input_ids, attention_mask, token_type_ids (without effect): the same values as separate
        arguments. messages: a conversation, or a batch of them, instead of a prompt: mappings with
        role and content, which the model's chat template renders. chat_template: the name of a
        template, where there are several. chat_template_kwargs: for `Chat.render` (tools,
        enable_thinking, …). add_special_tokens: whether the tokenizer adds its special tokens (BOS)
        to a text; switch it off for text that already has them, such as a rendered chat template.
        max_new_tokens: by default the rest of the model's length, at most 256. stop: a row ends
        when its text contains one of these strings; a stop string may name special tokens.
        eos_token_id: replaces the model's EOS ids. streamer: for one row only; gets committed
        tokens, which are never taken back. prefix: a result of the method `prefix`, for prompts
        that all begin with its tokens, which are then not run again. trace: also return the drafts,
        verdicts and commits of each period as `GenerationOutput.trace`; only for one row, in modes
        that draft, with backend eager. Pass a `Tracing` for its options.

        mode: ``sirius``, ``exact`` (dense greedy tokens), ``sample`` (tokens of the full path's
        distribution), ``full`` or ``sparse``; by default the artifact's. temperature (1), top_k (0:
        no limit), top_p (1), min_p (0), typical_p (1), seed: for mode ``sample``; also for ``full``
        and ``sparse``, which sample where one of them is given. Those that are not given have the
        artifact's defaults, from the model's generation config. seed: one per row; or one number,
        the first row's seed, from which the others count up. A row's tokens depend only on its own
        seed, not on other rows.

        logits: transformers' options repetition_penalty, no_repeat_ngram_size, bad_words_ids,
        suppress_tokens, min_new_tokens and the others of `LogitsOptions`, with the same names and
        meanings. Default: the model's generation config (``repetition_penalty=1.0``,
        ``suppress_tokens=[]``, … switch an option off). They are applied to the full path's logits
        at every verified token, with the tokens before it, so that mode ``exact`` gives the tokens
        of transformers' greedy search with the same options. The sparse path's logits are processed
        in the same way.

        logits_processor: callables ``(input_ids [rows, tokens], scores [rows, V]) -> scores``, as
        in transformers, applied after the options above. They are called for every drafted or
        verified node, in groups of equal length without padding. A row of `input_ids` is therefore
        not a row of the batch, and they must not keep state between calls. A period of K tokens
        calls them at least K times, and each call waits for the device.

        logprobs: also return the log-probability of each committed token and of this many of the
        likeliest tokens. They are the full path's (in mode ``sparse`` the sparse path's), after
        processors and before temperature, top_k, top_p, min_p and typical_p, like transformers'
        ``scores`` of a greedy run.

        With any of these three, a period runs step by step, even on a back end that runs whole
        periods as one graph or as one recording.

        The next options default to the artifact's values. period: tokens per verification; or
        ``"auto"``, to choose it at run time with the tree width, by measured speed. tree_width: the
        number of drafted paths. threshold: the probability that a drafted token needs to be
        accepted, at verify_temperature. confidence: the probability that a draft needs to go on (0:
        drafts never stop early). refresh: number of periods after which `griffin` chooses its
        neurons again (0: never).

        fallback: whether to compare drafts with dense decoding by measured time: while drafting is
        slower, decode densely and try drafts again now and then; and choose the length of drafts.
        Default: on where neither period nor tree_width is given, except in mode ``sample``. Its
        choices depend on the clock, and so do the tokens of modes ``sirius`` and ``sample``; those
        of ``exact`` do not. `GenerationStats.fallback` reports them.

        lookup: n, the length of the n-grams by which drafts are looked up (0: never). Where a row's
        last n tokens occurred earlier in its text, the tokens that followed them there are drafted,
        without a sparse step. Default: as for fallback. Only for chains, on back ends that run
        entry by entry.

        Raises GenerationError for a request that can't be served, and ConfigError for an option out
        of range; both name the limit, and the model can serve further calls. Raises ArtifactError
        where the mapped file was written to: load the model again.
        """
        self.check()
        if messages is not None:
            if not (inputs is input_ids is attention_mask is None):
                raise GenerationError("both messages and a prompt are given: give one of them")
            inputs = self._render(messages, chat_template, chat_template_kwargs)
            add_special_tokens = False  # the template's text has them
        elif chat_template is not None or chat_template_kwargs is not None:
            raise GenerationError(
                "chat_template and chat_template_kwargs are only for messages: leave them out, or "
                "give messages"
            )
        prompts = self._prompts.read(
            inputs, input_ids, attention_mask, add_special_tokens=add_special_tokens
        )
        options = Options(
            mode=self.program.period.mode if mode is None else mode,
            rule=cast(RuleNumbers, {n: v for n, v in more.items() if n in OPTIONS}),
            period=period,
            tree_width=tree_width,
            confidence=confidence,
            refresh=refresh,
            fallback=fallback,
            lookup=lookup,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            typical_p=typical_p,
            seed=seed,
            logits=cast(LogitsOptions, {n: v for n, v in more.items() if n not in OPTIONS}),
            logits_processor=logits_processor,
            logprobs=logprobs,
        )
        request = self.request(
            options,
            [len(prompt) for prompt in prompts],
            max_new_tokens,
            eos_token_id,
            stop,
            streams=self.backend.stream_seconds > 0.0,
        )
        if streamer is not None and len(prompts) != 1:
            raise GenerationError(f"a streamer takes one row, the batch has {len(prompts)}")
        if prefix is not None:
            prefix.check(prompts)
        tracing = (Tracing() if trace else None) if isinstance(trace, bool) else trace
        if tracing is not None:
            check_traceable(self.backend, request, len(prompts))
        generation = Generation(
            self.backend,
            self.tokenizer,
            prompts,
            request,
            streamer,
            self.costs(len(prompts)),
            prefix,
            tracing,
        )
        ran_on(self.backend.threads)
        rows, stats = generation.run()
        self._check_file()
        if streamer is not None:
            streamer.end()
        return GenerationOutput(
            prompts=tuple(map(tuple, prompts)),
            tokens=tuple(tuple(row.tokens) for row in rows),
            texts=None
            if (tokenizer := self.tokenizer) is None
            else tuple(
                answer_text(tokenizer, prompt, row.tokens, request.stop)
                for prompt, row in zip(prompts, rows, strict=True)
            ),
            finish_reasons=tuple(row.reason or FinishReason.LENGTH for row in rows),
            seeds=request.seeds,
            stats=stats,
            logprobs=None if logprobs is None else tuple(tuple(row.logprobs) for row in rows),
            steps=generation.steps,
            trace=generation.trace,
        )

    def request(
        self,
        options: Options,
        prompt_lengths: Sequence[int],
        max_new_tokens: int | None = None,
        eos_token_id: int | Sequence[int] | Array | None = None,
        stop: str | Sequence[str] | None = None,
        *,
        streams: bool = False,
    ) -> Request:
        """Checks options of `generate` for prompts of these lengths; raises the same errors.
        streams: see `read_options`.
        """
        return read_options(
            options,
            self.program,
            self.backend.limits,
            prompt_lengths=prompt_lengths,
            max_new_tokens=max_new_tokens,
            eos=self._eos(eos_token_id),
            stop=self._stop(stop),
            streams=streams,
            looks_up=self.backend.looks_up,
        )

    def check(self) -> None:
        """Raises ArtifactError where the mapped file has changed, and GenerationError in a forked
        process that lacks its parent's threads.
        """
        check_threads_live(self.backend.threads)
        self._check_file()

    def _render(
        self, messages: Messages, template: str | None, options: Mapping[str, Any] | None
    ) -> list[str]:
        """The prompt of each conversation."""
        if self.chat is None:
            raise GenerationError(NO_TEMPLATE)
        given = {**(options or {}), "template": template}
        return [self.chat.render(one, **given) for one in conversations(messages)]

    def _check_file(self) -> None:
        if self._file is not None:
            self._file.check()

    def _eos(self, eos_token_id: int | Sequence[int] | Array | None) -> frozenset[int]:
        if eos_token_id is None:
            return frozenset(self.program.eos_token_ids)
        return frozenset(read_ids(eos_token_id, "eos_token_id"))

    def _stop(self, given: str | Sequence[str] | None) -> tuple[str, ...]:
        if not isinstance(given, str | Sequence | None):
            raise GenerationError(f"stop must be text, or a list of texts, got {given!r}")
        stop = (given,) if isinstance(given, str) else tuple(given or ())
        if stop and self.tokenizer is None:
            raise GenerationError("stop strings need a tokenizer, and the artifact holds none")
        for string in stop:
            if not isinstance(string, str):
                raise GenerationError(
                    f"a stop string must be text, got {string!r}; give token ids that end a row as "
                    "eos_token_id"
                )
            if not string:
                raise GenerationError("a stop string is empty: it would stop every row at once")
            if not is_text(string):
                raise GenerationError(
                    f"stop string {shown(string)} has a lone surrogate, which is not valid text: "
                    "decode its bytes as UTF-8"
                )
        return stop
