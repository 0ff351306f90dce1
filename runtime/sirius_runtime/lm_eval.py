"""Support for lm-evaluation-harness: importing this module registers the model ``sirius``.

    import lm_eval
    import sirius_runtime.lm_eval
    lm_eval.simple_evaluate(
        model="sirius", model_args="pretrained=model.sirius,mode=exact", tasks=["gsm8k"]
    )

    python -m sirius_runtime.lm_eval run --model sirius --model_args pretrained=model.sirius …

The harness finds a model only if its module is imported, so its command `lm_eval` does not know
this one. The second form imports it, then runs that command.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sirius_runtime.chat import Chat
from sirius_runtime.errors import ConfigError, GenerationError
from sirius_runtime.loading import load
from sirius_runtime.model import GenerationOutput, SiriusModel
from sirius_runtime.request import Mode
from sirius_runtime.tokenizer_guard import guarded

_LOADING = ("device", "dtype", "backend", "threads")
_GENERATION = (
    *("threshold", "period", "tree_width", "verify_temperature"),
    *("confidence", "refresh", "fallback", "lookup"),
)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("sirius")
class SiriusLM(TemplateLM):
    """A compiled model. Log-likelihoods are the full path's in every mode, because they score given
    tokens. Answers are generated in `mode`.
    """

    def __init__(
        self,
        pretrained: str | SiriusModel,
        *,
        mode: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **options: Any,
    ) -> None:
        """pretrained: an artifact's path, or a loaded model. options: those of `load` (device,
        dtype, backend, threads) and of `generate` (threshold, period, …).
        """
        super().__init__()
        unknown = [name for name in options if name not in (*_LOADING, *_GENERATION)]
        if unknown:
            raise ConfigError(
                f"{', '.join(unknown)}: not understood; model_args has pretrained, mode, "
                f"batch_size, max_length, max_gen_toks, {', '.join((*_LOADING, *_GENERATION))}"
            )
        self.loaded = _loaded(pretrained, {n: v for n, v in options.items() if n in _LOADING})
        if self.loaded.tokenizer is None:
            raise GenerationError(
                "the artifact holds no tokenizer, and the harness gives text; compile the model "
                "with its tokenizer"
            )
        self._name = str(pretrained) if isinstance(pretrained, str) else "sirius"
        self._options = {"mode": mode} | {n: v for n, v in options.items() if n in _GENERATION}
        self.batch_size = _batch_size(batch_size)
        # Leaves one position for an answer. A scored row may have one token more: the last is not
        # run.
        self.max_length = self.loaded.program.model.max_seq_len - 1
        if max_length is not None:
            self.max_length = min(self.max_length, int(max_length))
        self.max_gen_toks = int(max_gen_toks)
        self.outputs: list[GenerationOutput] = []
        """The outputs so far, batch by batch, for their statistics."""

    # tokens

    @property
    def eot_token_id(self) -> int:
        """The first EOS id."""
        ids = self.loaded.program.eos_token_ids
        if not ids:
            raise GenerationError("the model has no EOS token, which the harness needs here")
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, else EOS."""
        ids = self.tok_encode("", add_special_tokens=True)
        return ids[0] if ids else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text, by default with the tokenizer's special tokens, unless the text
        begins with those itself (a chat template's does).
        """
        tokenizer = self.loaded.tokenizer
        assert tokenizer is not None
        with guarded():
            plain = tokenizer.encode(string, add_special_tokens=False).ids
            if add_special_tokens is False:
                return list(plain)
            whole = tokenizer.encode(string).ids
            before = tokenizer.encode("").ids
        if add_special_tokens is None and before and plain[: len(before)] == before:
            return list(plain)
        return list(whole)

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests."""
        return self._name.replace("/", "__")

    # chat

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation's text, by the artifact's own template."""
        return self._chat.render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, for the harness's records."""
        if not chat_template:
            return None
        templates = self._chat.spec.templates
        name = chat_template if isinstance(chat_template, str) else "default"
        if name in templates:
            return str(templates[name])
        if isinstance(chat_template, bool) and len(templates) == 1:
            return str(next(iter(templates.values())))
        raise GenerationError(
            f"there is no chat template {name!r}; the model has {', '.join(templates)}"
        )

    @property
    def _chat(self) -> Chat:
        chat = self.loaded.chat
        if chat is None:
            raise GenerationError(
                "the artifact holds no chat template; leave out --apply_chat_template, or compile "
                "the model with its template"
            )
        return chat

    # requests

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        answers: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        for batch in _batched(order, self.batch_size):
            rows, starts = [], []
            for index in batch:
                _, context, continuation = requests[index]
                row = (context + continuation)[-(self.max_length + 1) :]
                rows.append(row)
                starts.append(max(1, len(row) - len(continuation)))
            for index, scores in zip(batch, self.loaded.score(rows, start=starts), strict=True):
                answers[index] = (sum(scores.logprobs), all(scores.greedy))
                if (key := requests[index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[index])
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, scored in windows of the model's length."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to its first stop string."""
        given = [request.args for request in requests]
        asked = [_Asked.of(context, options, self) for context, options in given]
        order = sorted(range(len(asked)), key=lambda i: (asked[i].key, -len(asked[i].ids)))
        texts: dict[int, str] = {}
        for _, alike in groupby(order, key=lambda i: asked[i].key):
            for batch in _batched(list(alike), self.batch_size):
                first = asked[batch[0]]
                output = self.loaded.generate(
                    input_ids=[asked[i].ids for i in batch],
                    stop=first.until,
                    max_new_tokens=first.new_tokens,
                    **(self._options | dict(first.sampling)),
                )
                self.outputs.append(output)
                assert output.texts is not None
                for index, text in zip(batch, output.texts, strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return [texts[index] for index in range(len(asked))]


@dataclass(frozen=True)
class _Asked:
    """The options of one request for an answer."""

    ids: list[int]
    until: tuple[str, ...]
    new_tokens: int
    sampling: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """Requests that share it can share a batch."""
        return self.until, self.new_tokens, self.sampling

    @classmethod
    def of(cls, context: str, options: dict[str, Any], model: SiriusLM) -> _Asked:
        given = dict(options)
        until = given.pop("until", None) or []
        lengths = [given.pop(name, None) for name in _LENGTHS]
        new_tokens = next((int(n) for n in lengths if n is not None), model.max_gen_toks)
        draws = given.pop("do_sample", None)
        sampling = {name: given.pop(name) for name in _SAMPLING if name in given}
        if given:
            raise ConfigError(f"{', '.join(given)}: unknown generation options; leave them out")
        if not (draws if draws is not None else sampling.get("temperature")):
            sampling = {}
        else:
            sampling["mode"] = Mode.SAMPLE
        # As the harness does for other models: keeps the end of a context that is too long.
        new_tokens = min(new_tokens, model.max_length)
        room = max(1, model.max_length + 1 - new_tokens)
        ids = model.tok_encode(context)[-room:] or [model.prefix_token_id]
        stops = [until] if isinstance(until, str) else until
        return cls(ids, tuple(s for s in stops if s), new_tokens, tuple(sorted(sampling.items())))


def _loaded(pretrained: str | SiriusModel, options: dict[str, Any]) -> SiriusModel:
    return load(pretrained, **options) if isinstance(pretrained, str) else pretrained


def _batch_size(given: int | str) -> int:
    try:
        size = int(given)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"batch_size must be a number of 1 or more, got {given!r}")
    return size


def _batched(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
