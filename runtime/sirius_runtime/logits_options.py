"""Options of logits processing: an artifact's defaults, and the options of `generate`. Names and
meanings are those of transformers' generation config.

Values are read and checked without PyTorch; `sirius_runtime.logits` applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from sirius_runtime.errors import ConfigError
from sirius_runtime.sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor

MOST_TOKENS = 2**31 - 1
"""The longest sequence, and the largest vocabulary."""
_LARGEST = 2.0**127  # a bound within float32's range

LogitsProcessor: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""As in transformers: (input_ids [rows, tokens], scores [rows, V] float32) -> scores."""


@dataclass(frozen=True)
class SequenceBias:
    """`bias` is added to the logit of the last of `tokens` where the others precede it."""

    tokens: tuple[int, ...]
    bias: float


@dataclass(frozen=True)
class LogitsSpec:
    """Options of logits processing; the defaults change nothing.

    Each is described in `sirius_runtime.logits`. If `min_new_tokens` is given, `min_length` has no
    effect, as in transformers.
    """

    sequence_bias: tuple[SequenceBias, ...] = ()
    encoder_repetition_penalty: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    renormalize_logits: bool = False

    @property
    def changes_nothing(self) -> bool:
        return replace(self, min_new_tokens=self.min_new_tokens or None) == LogitsSpec()

    def non_defaults(self) -> dict[str, Any]:
        """The options that are not at their defaults, by name."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in own.items() if value != getattr(_NOTHING, name)}


_NOTHING = LogitsSpec()


@dataclass(frozen=True)
class SamplingSpec:
    """An artifact's defaults for mode `sample`; None where it has no default."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None

    def non_defaults(self) -> dict[str, Any]:
        """The values that are given, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class GenerationSpec:
    """The defaults from the model's generation config."""

    logits: LogitsSpec = LogitsSpec()
    sampling: SamplingSpec = SamplingSpec()


class LogitsOptions(TypedDict, total=False):
    """Options of `generate`, each None or left out for the artifact's default.

    1.0, 0, False and an empty list switch an option off; `[]` does so too where one token id is
    expected.
    """

    sequence_bias: Mapping[Sequence[int], float] | Sequence[Sequence[Any]] | None
    encoder_repetition_penalty: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    min_length: int | None
    min_new_tokens: int | None
    forced_bos_token_id: int | Sequence[int] | None
    forced_eos_token_id: int | Sequence[int] | None
    remove_invalid_values: bool | None
    exponential_decay_length_penalty: Sequence[float] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    renormalize_logits: bool | None


@dataclass(frozen=True)
class Scoring:
    """How a run's logits are processed, and which log-probabilities it reports.

    `processors`: the user's callables, applied after the options of `logits`. `logprobs`: the
    number of likeliest tokens that are reported with each committed token; None: no
    log-probabilities are reported.
    """

    logits: LogitsSpec
    processors: tuple[LogitsProcessor, ...]
    logprobs: int | None

    @property
    def processing(self) -> str:
        """The names of the options that change logits, for messages."""
        return ", ".join(
            [*self.logits.non_defaults(), *(["logits_processor"] if self.processors else [])]
        )

    @property
    def names(self) -> str:
        """The names of all options that need processed logits, for messages."""
        reported = [] if self.logprobs is None else ["logprobs"]
        return ", ".join([name for name in (self.processing, *reported) if name])


@dataclass(frozen=True)
class TokenLogprobs:
    """A committed token and its log-probability. `top`: the likeliest tokens at its place, as pairs
    of token id and log-probability, best first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def merged(options: LogitsOptions, default: LogitsSpec, vocabulary: int) -> LogitsSpec:
    """`default`, with the given options replaced.

    Raises ConfigError, naming the option, for an invalid value.
    """
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name not in _READERS:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
        if value is not None:
            given[name] = _READERS[name](name, value)
    if "min_length" in given and "min_new_tokens" not in given:
        given["min_new_tokens"] = None  # else the artifact's would override the given min_length
    spec = replace(default, **given)
    for name, tokens in _token_ids(spec):
        if wrong := [token for token in tokens if not 0 <= token < vocabulary]:
            raise ConfigError(
                f"{name} has token id {wrong[0]}, outside of the vocabulary (0..{vocabulary - 1})"
            )
    return spec


def check_generation(spec: GenerationSpec, vocabulary: int) -> None:
    """Raises ConfigError, naming the option, for an invalid value."""
    given: Any = spec.logits.non_defaults()
    if spec.logits.sequence_bias:
        given["sequence_bias"] = [(entry.tokens, entry.bias) for entry in spec.logits.sequence_bias]
    merged(given, LogitsSpec(), vocabulary)
    Sampling(**spec.sampling.non_defaults())


def check_processors(processors: Any) -> tuple[LogitsProcessor, ...]:
    """One callable or several as a tuple; raises ConfigError for anything else."""
    every = tuple(processors) if isinstance(processors, Sequence) else (processors,)
    for processor in every:
        if not callable(processor):
            raise ConfigError(
                "logits_processor must be callables (input_ids, scores) -> scores, got "
                f"{type(processor).__name__}"
            )
    return every


def _token_ids(spec: LogitsSpec) -> list[tuple[str, Sequence[int]]]:
    """The options that hold token ids, with those ids."""
    bos = spec.forced_bos_token_id
    return [
        *(("sequence_bias", entry.tokens) for entry in spec.sequence_bias),
        *(("bad_words_ids", tokens) for tokens in spec.bad_words_ids),
        ("forced_bos_token_id", () if bos is None else (bos,)),
        ("forced_eos_token_id", spec.forced_eos_token_id),
        ("suppress_tokens", spec.suppress_tokens),
        ("begin_suppress_tokens", spec.begin_suppress_tokens),
    ]


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _is_real(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number: Any = value
    return bool(-_LARGEST <= number <= _LARGEST)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _penalty(name: str, value: Any) -> float:
    if not _is_real(value) or value <= 0:
        raise ConfigError(f"{name} must be a number > 0 (1.0: none), got {value!r}")
    return float(value)


def _count(name: str, value: Any) -> int:
    if not _is_integer(value) or not 0 <= value <= MOST_TOKENS:
        raise ConfigError(f"{name} must be an integer in 0..{MOST_TOKENS} (0: none), got {value!r}")
    return int(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")
    return value


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    every = [value] if _is_integer(value) else value
    if not _is_list(every) or not all(map(_is_integer, every)):
        raise ConfigError(f"{name} must be a list of token ids ([]: none), got {value!r}")
    return tuple(map(int, every))


def _one_token(name: str, value: Any) -> int | None:
    tokens = _tokens(name, value)
    if len(tokens) > 1:
        raise ConfigError(f"{name} must be one token id ([]: none), got {value!r}")
    return tokens[0] if tokens else None


def _sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not _is_list(value) or not all(_is_list(entry) and len(entry) for entry in value):
        raise ConfigError(f"{name} must be lists of token ids ([]: none), got {value!r}")
    return tuple(_tokens(name, entry) for entry in value)


def _biases(name: str, value: Any) -> tuple[SequenceBias, ...]:
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    form = "must be {(token ids): bias} or [[token ids], bias] pairs ([]: none)"
    if not _is_list(pairs) or not all(_is_list(pair) and len(pair) == 2 for pair in pairs):
        raise ConfigError(f"{name} {form}, got {value!r}")
    found: dict[tuple[int, ...], float] = {}
    for tokens, bias in pairs:
        if not _is_list(tokens) or not len(tokens):
            raise ConfigError(f"{name} {form}, got {value!r}")
        if not _is_real(bias):
            raise ConfigError(
                f"{name} must have finite biases, got {bias!r}; bad_words_ids forbids a sequence"
            )
        found[_tokens(name, tokens)] = float(bias)
    return tuple(SequenceBias(tokens, bias) for tokens, bias in found.items())


def _decay(name: str, value: Any) -> tuple[int, float] | None:
    if _is_list(value) and not len(value):
        return None
    if (
        not _is_list(value)
        or len(value) != 2
        or not (_is_integer(value[0]) and 0 <= value[0] <= MOST_TOKENS)
        or not (_is_real(value[1]) and value[1] > 0)
    ):
        raise ConfigError(f"{name} must be (tokens >= 0, factor > 0) ([]: none), got {value!r}")
    return int(value[0]), float(value[1])


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "sequence_bias": _biases,
    "encoder_repetition_penalty": _penalty,
    "repetition_penalty": _penalty,
    "no_repeat_ngram_size": _count,
    "encoder_no_repeat_ngram_size": _count,
    "bad_words_ids": _sequences,
    "min_length": _count,
    "min_new_tokens": _count,
    "forced_bos_token_id": _one_token,
    "forced_eos_token_id": _tokens,
    "remove_invalid_values": _flag,
    "exponential_decay_length_penalty": _decay,
    "suppress_tokens": _tokens,
    "begin_suppress_tokens": _tokens,
    "renormalize_logits": _flag,
}
