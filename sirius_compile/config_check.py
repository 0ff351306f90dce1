"""Checks a model's files for impossible values that transformers accepts silently. Each is refused
by name, before anything is built.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from sirius_compile.rope import rope_parameters
from sirius_runtime.dtypes import dtype_name
from sirius_runtime.errors import ModelNotFoundError, UnsupportedModelError
from sirius_runtime.spec import JSON

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_LEAST_POSITIONS = 2
# Keys with this word are bounds, which may be infinite, as those of state space layers are.
_MAY_BE_INFINITE = "limit"
_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")


def read_object(path: Path, remedy: str) -> dict[str, JSON]:
    """The JSON object in one of the model's files. Raises ModelNotFoundError if it can't be read;
    `remedy` ends the message.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ModelNotFoundError(f"{path} can't be read ({reason:.200}); {remedy}") from error
    if not isinstance(document, dict):
        raise ModelNotFoundError(
            f"{path} holds a JSON {type(document).__name__} instead of an object; {remedy}"
        )
    return document


def check_config(config: PretrainedConfig, name: str) -> None:
    """Raises UnsupportedModelError, with the key of config.json, for a value out of its range."""

    def refuse(key: str, value: Any, wanted: str) -> None:
        raise UnsupportedModelError(
            f"{name}: config.json gives {key} as {value!r}; it must be {wanted}. Compare it with "
            "the original model's"
        )

    for key, value in _numbers(config.to_dict()):
        if math.isnan(value) or (math.isinf(value) and _MAY_BE_INFINITE not in key):
            refuse(key, value, "a finite number")
        if key.endswith(("eps", "epsilon")) and value < 0:
            refuse(key, value, "at least 0")
    for key in _COUNTS:
        count: Any = getattr(config, key, None)
        if isinstance(count, int | float | str) and (type(count) is not int or count < 1):
            refuse(key, count, "an integer of at least 1")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and (type(positions) is not int or positions < _LEAST_POSITIONS):
        refuse("max_position_embeddings", positions, f"an integer of at least {_LEAST_POSITIONS}")
    for parameters in rope_parameters(config).values():
        for key in ("rope_theta", "factor", "original_max_position_embeddings"):
            given: Any = parameters.get(key)
            if given is not None and not (type(given) in (int, float) and given > 0):
                refuse(key, given, "a number above 0")


def check_token_ids(generation: GenerationConfig, config: PretrainedConfig, name: str) -> None:
    """Raises UnsupportedModelError if a special token's id is not an integer."""
    for source, file in ((generation, "generation_config.json"), (config, "config.json")):
        for key in _TOKENS:
            value: Any = getattr(source, key, None)
            many = isinstance(value, list | tuple) and key == "eos_token_id"
            ids = value if many else [value]
            if value is not None and any(type(token) is not int for token in ids):
                wanted = "an integer or a list of integers" if many else "an integer"
                raise UnsupportedModelError(
                    f"{name}: {file} gives {key} as {value!r:.80}; it must be {wanted}"
                )


def read_generation_config(
    directory: Path, config: PretrainedConfig, name: str
) -> GenerationConfig:
    """The model's generation config, from its own file if it has one."""
    path = directory / "generation_config.json"
    if not path.exists():
        return GenerationConfig.from_model_config(config)
    remedy = f"fix it, or remove it to generate as {name}'s config.json says"
    read_object(path, remedy)
    try:
        return GenerationConfig.from_pretrained(directory)
    except Exception as error:  # bad values may raise any exception in transformers
        raise UnsupportedModelError(
            f"{path}: transformers can't read it ({type(error).__name__}: {error!s:.200}); {remedy}"
        ) from error


def check_weights(
    names: Iterator[tuple[str, torch.dtype]], get: Callable[[str], Tensor], source: str
) -> None:
    """Reads every weight once, without a copy. `names`: each weight with its dtype in the artifact.

    Raises UnsupportedModelError, with the weight's name, if one holds NaN, infinity, or a number
    beyond the range of its dtype in the artifact.
    """
    for name, dtype in names:
        tensor = get(name)
        if tensor.is_meta or tensor.numel() == 0 or not tensor.is_floating_point():
            continue
        low, high = (float(bound) for bound in torch.aminmax(tensor.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            what = "NaN" if math.isnan(low) else "infinity"
            raise UnsupportedModelError(
                f"{source}: its weight {name} holds {what}, so its output would be meaningless; "
                "download or save the model again"
            )
        if max(-low, high) > torch.finfo(dtype).max:
            raise UnsupportedModelError(
                f"{source}: its weight {name} holds {max(-low, high):g}, which is out of the range "
                f"of {dtype_name(dtype)}; use --dtype bfloat16 or float32"
            )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """The floats within a config, each with the key that it stands under."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, key)
