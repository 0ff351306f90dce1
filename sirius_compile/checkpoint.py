"""Weights of a model directory: mapped from its safetensors, one at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from sirius_compile.models import ModelSource
from sirius_runtime.errors import ModelNotFoundError, UnsupportedModelError

_INDEX = "model.safetensors.index.json"


class WeightSource(Protocol):
    """Where the compiler reads weights, by the names of the model's state dict."""

    def get(self, name: str) -> Tensor: ...

    def dtype(self, name: str) -> torch.dtype: ...


class Checkpoint:
    """The safetensors files of a directory, opened but not read: tensors are mapped when asked for."""

    def __init__(self, directory: Path) -> None:
        self._files = {}
        self._home: dict[str, str] = {}
        for shard in _shards(directory):
            try:
                opened = safe_open(directory / shard, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelNotFoundError(
                    f"{directory / shard} can't be read ({error}); download it again"
                ) from error
            self._files[shard] = opened
            self._home |= dict.fromkeys(opened.keys(), shard)

    def names(self) -> list[str]:
        """Names of all stored tensors."""
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, without reading it."""
        return tuple(self._files[self._home[name]].get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """The tensor, mapped from its file."""
        return self._files[self._home[name]].get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a stored tensor."""
        return self.get(name).dtype


class _Renamed:
    """A weight source under other names."""

    def __init__(self, source: WeightSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def get(self, name: str) -> Tensor:
        return self._source.get(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._names[name])


class _StateDict:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def get(self, name: str) -> Tensor:
        return self._tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype


def open_weights(
    source: ModelSource,
    config: PretrainedConfig,
    names: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, tuple[str, ...]],
) -> WeightSource:
    """The weights of `names` (name → shape), mapped where the files hold them as the model does.

    A tied weight may stand under any of its `aliases`. Where names or shapes differ (transformers
    renames and converts at load), the model is loaded and its state dict taken. Raises
    UnsupportedModelError where a weight is in neither.
    """
    checkpoint = Checkpoint(source.directory)
    stored = set(checkpoint.names())
    found = {
        name: next((n for n in (name, *aliases.get(name, ())) if n in stored), None)
        for name in names
    }
    if all(
        home is not None and checkpoint.shape(home) == tuple(names[name])
        for name, home in found.items()
    ):
        return _Renamed(checkpoint, {name: home for name, home in found.items() if home})
    model = AutoModelForCausalLM.from_pretrained(
        source.directory,
        config=config,
        dtype="auto",
        use_safetensors=True,
        trust_remote_code=source.trust_remote_code,
    )
    tensors = model.state_dict()
    missing = sorted(n for n in names if n not in tensors)
    if missing:
        raise UnsupportedModelError(
            f"{source.name}: weights {', '.join(missing[:3])} are not in the checkpoint"
        )
    return _StateDict(tensors)


def checkpoint_dtype(source: ModelSource, config: PretrainedConfig) -> torch.dtype:
    """The dtype of the stored floating point weights, by the config or else by majority.

    Raises UnsupportedModelError for a quantised checkpoint.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{source.name} is a quantised checkpoint; compile the unquantised one"
        )
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    checkpoint = Checkpoint(source.directory)
    counts = Counter(map(checkpoint.dtype, checkpoint.names()))
    return max((d for d in counts if d.is_floating_point), key=lambda d: counts[d])


def _shards(directory: Path) -> list[str]:
    if not (directory / _INDEX).exists():
        return sorted(p.name for p in directory.glob("*.safetensors"))
    shards = sorted(set(json.loads((directory / _INDEX).read_text())["weight_map"].values()))
    for shard in shards:
        if not (directory / shard).exists():
            raise ModelNotFoundError(
                f"{directory} lacks {shard}, which {_INDEX} names; download the model again"
            )
    return shards
