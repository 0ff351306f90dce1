"""Rotary embeddings whose frequencies depend on how long the text is, as functions of one token.

Most variants (linear, llama3, yarn) only change constants. Two look at the longest position of a
call, which a graph that serves ragged rows, chunks and trees must not:

* ``dynamic`` (NTK): a token at position p uses the frequencies for a text of p + 1 tokens, or of
  the original length where that is more. So do tokens that transformers decodes one by one.
* ``longrope``: once a text is longer than the original length, all its tokens take other
  frequencies, those in the cache too. Only texts up to the original length can be served.
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
"""How models lay out the angles [..., D/2] of one token in cos and sin [..., D]."""


@dataclass(frozen=True)
class Longest:
    """The longest text that can be served; None where the config names no limit. `why`: what sets
    it, and what to change for more.
    """

    tokens: int | None
    why: str


def longest_sequence(config: PretrainedConfig) -> Longest:
    """How long a text may be, by the config's positions and rotary embeddings."""
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
                f"{_ORIGINAL} of config.json: past it rope_type longrope changes the frequencies "
                "of all tokens, those in the cache too, so that no longer text can be served"
            )
        elif limit is not None and factor and kind in _CONSTANT:
            why = f"max_position_embeddings of config.json; {_longer_by(kind, parameters, limit)}"
    return Longest(limit, why)


def max_seq_len(config: PretrainedConfig, wanted: int | None) -> int:
    """The longest sequence to serve. Raises ConfigError where the model can't serve what is wanted,
    and says what sets the limit.
    """
    longest = longest_sequence(config)
    limit = longest.tokens or wanted or 2048
    if wanted is not None and wanted > limit:
        raise ConfigError(f"--max-seq-len must be in 2..{limit} ({longest.why}), got {wanted}")
    return int(wanted or limit)


def rope_warnings(config: PretrainedConfig) -> Iterator[str]:
    """What a user should know of a model's rotary embeddings."""
    limit = getattr(config, "max_position_embeddings", None)
    for parameters in rope_parameters(config).values():
        kind, factor = str(parameters.get("rope_type")), parameters.get("factor")
        original = parameters.get(_ORIGINAL)
        if "dynamic" in kind:
            yield (
                f"rope_type {kind}: past {limit} tokens each token is placed by its own position, "
                "as where transformers decodes one by one; transformers places all tokens of a "
                "prompt by the prompt's length, and so answers longer prompts differently"
            )
        elif kind in _CONSTANT and limit and factor and original and factor * original > limit:
            yield f"texts are held to {limit} tokens; {_longer_by(kind, parameters, limit)}"


def _longer_by(kind: str, parameters: Mapping[str, Any], limit: int) -> str:
    """How to have longer texts served, of a kind that only changes constants."""
    factor, original = parameters["factor"], parameters.get(_ORIGINAL, limit)
    return (
        f"for longer ones, up to the {int(factor * original)} that rope_type {kind} of factor "
        f"{factor:g} reaches, raise max_position_embeddings there, with {_ORIGINAL} {original} "
        "beside the factor"
    )


def place_tokens_alone(model: nn.Module, config: PretrainedConfig) -> None:
    """Makes a model's rotary embeddings functions of each token's own position, before it is traced
    and outside of tracing. Raises UnsupportedModelError for one that can't be.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds if isinstance(kinds, dict) else {None: kinds}
        if any(isinstance(k, str) and ("dynamic" in k or k == "longrope") for k in kinds.values()):
            module.forward = _Rotary(module, kinds, config)


def rope_parameters(config: PretrainedConfig) -> dict[str | None, dict[str, Any]]:
    """Rotary parameters by layer type, None where all layers share them."""
    given: Any = getattr(config, "rope_parameters", None) or {}
    nested = given and all(isinstance(value, dict) for value in given.values())
    return given if nested else {None: given}


class _Rotary:
    """Stands in for the forward of a rotary module."""

    def __init__(self, module: Any, kinds: dict[str | None, str], config: PretrainedConfig) -> None:
        self._module = module
        # Without the decorator that updates the frequencies by the call's longest position: what is
        # left uses those that the module was made with, longrope's for short texts.
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
        own = {} if layer_type is None else {"layer_type": layer_type}
        return self._forward(self._module, x, position_ids, **own)


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
        own: dict[str, Any] = {} if layer_type is None else {"layer_type": layer_type}
        where = type(module).__name__
        for position in (0, self._original, 3 * self._original):
            wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](
                config, torch.device("cpu"), seq_len=position + 1, **own
            )
            if not torch.allclose(self._frequencies(torch.tensor(position)), wanted, rtol=1e-4):
                raise UnsupportedModelError(
                    f"{where}: its dynamic scaling of rotary frequencies is not the known one"
                )
        self._layout, self._scale = self._probe(module, forward, own, where)

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, D] of position_ids [B, T], in the dtype of `x`."""
        angles = position_ids[..., None].float() * self._frequencies(position_ids)
        angles = self._layout(angles)
        return (angles.cos() * self._scale).to(x.dtype), (angles.sin() * self._scale).to(x.dtype)

    def _frequencies(self, position_ids: Tensor) -> Tensor:
        """[..., D/2] of the token at each position."""
        length = (position_ids + 1).clamp(min=self._original)[..., None].float()
        grown = self._factor * length / self._original - (self._factor - 1)
        theta = self._theta * grown ** (self._size / (self._size - 2))
        exponent = torch.arange(0, self._size, 2, device=position_ids.device) / self._size
        return 1.0 / theta**exponent

    def _probe(
        self, module: Any, forward: Callable[..., Any], own: dict[str, Any], where: str
    ) -> tuple[Callable[[Tensor], Tensor], float]:
        """How the module's own forward lays out angles, and what it scales cos and sin by."""
        known = module._buffers[self._name]
        module._buffers[self._name] = inverse = torch.linspace(0.1, 0.7, self._size // 2)
        position = torch.tensor([[2]])
        try:
            result = forward(module, torch.zeros(1, 1, 1), position, **own)
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
            f"{where}: dynamic rotary frequencies in a layout that is not known (of angles a, b: "
            "a b, a b a b, or a a b b)"
        )
