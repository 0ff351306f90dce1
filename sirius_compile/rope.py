"""Rotary embeddings whose frequencies depend on the text's length, made functions of the position.

Most variants (linear, llama3, yarn) only change constants. Two use the longest position of a call.
A graph for rows of different lengths, prompt chunks and trees can't do that:

* ``dynamic`` (NTK): here a token at position p uses the frequencies for a text of p + 1 tokens, or
  of the original length if that is longer. In transformers, tokens decoded one by one do the same.
* ``longrope``: once a text is longer than the original length, the frequencies of all its tokens
  change, including tokens in the KV cache. So only texts up to the original length are supported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sirius_runtime.errors import ConfigError, UnsupportedModelError

_ORIGINAL = "original_max_position_embeddings"
_CONSTANT = ("linear", "llama3", "yarn")
"""Kinds of scaling that only change constants."""
_LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda angles: angles,
    lambda angles: torch.cat([angles, angles], -1),
    lambda angles: angles.repeat_interleave(2, -1),
)
"""The known layouts of a token's angles [..., D/2] in cos and sin [..., D]."""


@dataclass(frozen=True)
class Longest:
    """The longest supported text in tokens; None if the config has no limit. `why`: the reason for
    the limit, and how to raise it.
    """

    tokens: int | None
    why: str


def longest_sequence(config: PretrainedConfig) -> Longest:
    """The longest text that the config's positions and rotary embeddings support."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    why = "max_position_embeddings of config.json"
    for parameters in rope_parameters(config).values():
        kind, factor = str(parameters.get("rope_type")), parameters.get("factor")
        if limit is not None and "dynamic" in kind:
            limit = int(limit * parameters["factor"])
            why = f"max_position_embeddings of config.json times the factor of rope_type {kind}"
        elif kind == "longrope":
            limit = parameters.get(_ORIGINAL, limit)
            why = (
                f"{_ORIGINAL} of config.json: beyond it, rope_type longrope changes the "
                "frequencies of all tokens, also in the cache, so longer texts are not supported"
            )
        elif limit is not None and factor and kind in _CONSTANT:
            why = f"max_position_embeddings of config.json; {_longer_by(kind, parameters, limit)}"
    return Longest(limit, why)


def max_seq_len(config: PretrainedConfig, wanted: int | None) -> int:
    """The longest sequence in tokens: `wanted`, or else the model's limit. Raises ConfigError, with
    the reason for the limit, if `wanted` is above it.
    """
    longest = longest_sequence(config)
    limit = longest.tokens or wanted or 2048
    if wanted is not None and wanted > limit:
        raise ConfigError(f"--max-seq-len must be in 2..{limit} ({longest.why}), got {wanted}")
    return int(wanted or limit)


def rope_warnings(config: PretrainedConfig) -> Iterator[str]:
    """Warnings about a model's rotary embeddings."""
    limit = getattr(config, "max_position_embeddings", None)
    for parameters in rope_parameters(config).values():
        kind, factor = str(parameters.get("rope_type")), parameters.get("factor")
        original = parameters.get(_ORIGINAL)
        if "dynamic" in kind:
            yield (
                f"rope_type {kind}: beyond {limit} tokens, each token's frequencies depend on its "
                "own position, as when transformers decodes token by token. For a prompt, "
                "transformers uses the prompt's length instead, so it answers prompts of more than "
                f"{limit} tokens differently"
            )
        elif kind in _CONSTANT and limit and factor and original and factor * original > limit:
            yield f"texts are limited to {limit} tokens; {_longer_by(kind, parameters, limit)}"


def _longer_by(kind: str, parameters: Mapping[str, Any], limit: int) -> str:
    """How to raise the limit, for a kind that only changes constants."""
    factor, original = parameters["factor"], parameters.get(_ORIGINAL, limit)
    return (
        f"for up to {int(factor * original)} tokens (rope_type {kind} of factor {factor:g}), raise "
        f"max_position_embeddings in config.json, and set {_ORIGINAL} to {original} beside the "
        "factor"
    )


def place_tokens_alone(model: nn.Module, config: PretrainedConfig) -> None:
    """Makes a model's rotary embeddings functions of each token's own position. Call it before
    tracing. Raises UnsupportedModelError for an embedding of an unknown form.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds if isinstance(kinds, dict) else {None: kinds}
        if any(isinstance(k, str) and ("dynamic" in k or k == "longrope") for k in kinds.values()):
            module.forward = _Rotary(module, kinds, config)


def rope_parameters(config: PretrainedConfig) -> dict[str | None, dict[str, Any]]:
    """Rotary parameters by layer type; the key is None if all layers share them."""
    given: Any = getattr(config, "rope_parameters", None) or {}
    nested = given and all(isinstance(value, dict) for value in given.values())
    return given if nested else {None: given}


class _Rotary:
    """Replaces the forward of a rotary module."""

    def __init__(self, module: Any, kinds: dict[str | None, str], config: PretrainedConfig) -> None:
        self._module = module
        # The forward without its decorator, which updates the frequencies by the call's longest
        # position. It uses the module's initial frequencies: for longrope, those of short texts.
        self._forward = inspect.unwrap(type(module).forward)
        parameters = rope_parameters(config)
        self._dynamic = {
            layer_type: _Dynamic(module, self._forward, layer_type, parameters[layer_type], config)
            for layer_type, kind in kinds.items()
            if "dynamic" in kind
        }

    def __call__(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        if layer_type in self._dynamic:
            return self._dynamic[layer_type](x, position_ids)
        options = {} if layer_type is None else {"layer_type": layer_type}
        return self._forward(self._module, x, position_ids, **options)


class _Dynamic:
    """cos and sin of dynamic NTK scaling, by each token's own position."""

    def __init__(
        self,
        module: Any,
        forward: Callable[..., Any],
        layer_type: str | None,
        parameters: dict[str, Any],
        config: PretrainedConfig,
    ) -> None:
        prefix = "" if layer_type is None else f"{layer_type}_"
        self._name = f"{prefix}inv_freq"
        self._size = 2 * getattr(module, self._name).shape[0]
        self._theta = float(parameters["rope_theta"])
        self._factor = float(parameters["factor"])
        self._original = int(config.max_position_embeddings)
        options: dict[str, Any] = {} if layer_type is None else {"layer_type": layer_type}
        where = type(module).__name__
        for position in (0, self._original, 3 * self._original):
            wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](
                config, torch.device("cpu"), seq_len=position + 1, **options
            )
            if not torch.allclose(self._frequencies(torch.tensor(position)), wanted, rtol=1e-4):
                raise UnsupportedModelError(
                    f"{where}: its dynamic scaling of rotary frequencies has an unknown form"
                )
        self._layout, self._scale = self._probe(module, forward, options, where)

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, D] of position_ids [B, T], in the dtype of `x`."""
        angles = position_ids[..., None].float() * self._frequencies(position_ids)
        angles = self._layout(angles)
        return (angles.cos() * self._scale).to(x.dtype), (angles.sin() * self._scale).to(x.dtype)

    def _frequencies(self, position_ids: Tensor) -> Tensor:
        """The frequencies [..., D/2] of a token at each position."""
        length = (position_ids + 1).clamp(min=self._original)[..., None].float()
        grown = self._factor * length / self._original - (self._factor - 1)
        theta = self._theta * grown ** (self._size / (self._size - 2))
        exponent = torch.arange(0, self._size, 2, device=position_ids.device) / self._size
        return 1.0 / theta**exponent

    def _probe(
        self, module: Any, forward: Callable[..., Any], options: dict[str, Any], where: str
    ) -> tuple[Callable[[Tensor], Tensor], float]:
        """The layout of angles in the module's own forward, and its scale of cos and sin."""
        known = module._buffers[self._name]
        module._buffers[self._name] = inverse = torch.linspace(0.1, 0.7, self._size // 2)
        position = torch.tensor([[2]])
        try:
            result = forward(module, torch.zeros(1, 1, 1), position, **options)
        finally:
            module._buffers[self._name] = known
        scale = float(module.attention_scaling) if hasattr(module, "attention_scaling") else 1.0
        for layout in _LAYOUTS:
            angles = layout(2 * inverse)[None, None]
            wanted = angles.cos() * scale, angles.sin() * scale
            if isinstance(result, tuple) and all(
                a.shape == b.shape and torch.allclose(a, b, atol=1e-5)
                for a, b in zip(result, wanted, strict=True)
            ):
                return layout, scale
        raise UnsupportedModelError(
            f"{where}: its dynamic rotary frequencies have an unknown layout (known, of angles a "
            "and b: a b, a b a b, a a b b)"
        )
