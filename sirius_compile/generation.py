"""Reads the options for choosing tokens from a model's generation config, for the artifact."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

from transformers import GenerationConfig

from sirius_runtime.errors import ArtifactError, ConfigError
from sirius_runtime.logits_options import (
    GenerationSpec,
    LogitsOptions,
    LogitsSpec,
    SamplingSpec,
    check_generation,
    merged,
)
from sirius_runtime.spec import from_json

_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "do_sample": ((False,), "only mode sample draws tokens"),
    "num_beams": ((1,), "no beam search: one sequence is written"),
    "num_return_sequences": ((1,), "one answer for each prompt"),
    "penalty_alpha": ((0.0,), "no contrastive search"),
    "dola_layers": ((), "no contrast of layers"),
    "guidance_scale": ((1, 1.0), "no classifier-free guidance"),
    "watermarking_config": ((), "no watermark"),
    "constraints": ((), "no constrained search"),
    "force_words_ids": ((), "no constrained search"),
    "token_healing": ((False,), "the prompt's last token stays as it is"),
    "epsilon_cutoff": ((0, 0.0), "mode sample has no such cutoff"),
    "eta_cutoff": ((0, 0.0), "mode sample has no such cutoff"),
    "top_h": ((), "mode sample has no such cutoff"),
    "stop_strings": ((), "pass them as stop"),
    "max_time": ((), "there is no time limit"),
    "max_length": ((20,), "pass max_new_tokens"),
    "max_new_tokens": ((), "pass max_new_tokens"),
}
"""Options of transformers that are not supported: the values besides None that have no effect, and
a note for the user."""
_SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


def read_generation(
    config: GenerationConfig, vocabulary: int
) -> tuple[GenerationSpec, tuple[str, ...]]:
    """The artifact's defaults for choosing tokens, and a note on each value that is not applied.

    `vocabulary`: the number of token ids.
    """
    left_out: list[str] = []
    logits, sampling = LogitsSpec(), SamplingSpec()
    for name, value in _given(config, LogitsSpec):
        if name in _SUPPRESSED and isinstance(value, list | tuple):
            # An id outside the vocabulary has no effect, in transformers either.
            value = [token for token in value if not _is_no_token(token, vocabulary)]
        try:
            logits = merged(cast(LogitsOptions, {name: value}), logits, vocabulary)
        except ConfigError as error:
            left_out.append(_note(name, value, str(error)))
    for name, value in _given(config, SamplingSpec):
        try:
            found = from_json(
                SamplingSpec, sampling.non_defaults() | {name: value}, "generation_config"
            )
            check_generation(GenerationSpec(sampling=found), vocabulary)
            sampling = found
        except (ConfigError, ArtifactError) as error:
            left_out.append(_note(name, value, str(error)))
    for name, (neutral, meaning) in _UNSUPPORTED.items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            left_out.append(_note(name, value, meaning))
    return GenerationSpec(logits, sampling), tuple(left_out)


def _is_no_token(token: Any, vocabulary: int) -> bool:
    return isinstance(token, int) and not 0 <= token < vocabulary


def _given(
    config: GenerationConfig, spec: type[LogitsSpec | SamplingSpec]
) -> list[tuple[str, Any]]:
    """The config's values of a spec's fields."""
    values = [(field.name, getattr(config, field.name, None)) for field in fields(spec)]
    return [(name, value) for name, value in values if value is not None]


def _note(name: str, value: Any, meaning: str) -> str:
    shown = repr(value)
    return f"{name}={shown if len(shown) <= 60 else shown[:60] + '…'} ({meaning:.200})"
