"""Weights of a model directory: mapped from its safetensors, one at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from sirius_compile.models import INDEX_FILE, SINGLE_FILE, ModelSource
from sirius_runtime.dtypes import dtype_name, dtype_of
from sirius_runtime.errors import ModelNotFoundError, UnsupportedModelError
from sirius_runtime.spec import DType

_FLOATS = tuple(dtype_of(name) for name in DType)
_AGAIN = "download or save the model again"


class WeightSource(Protocol):
    """Where the compiler reads weights, by the names of the model's state dict."""

    def get(self, name: str) -> Tensor: ...

    def dtype(self, name: str) -> torch.dtype: ...


class _Store(WeightSource, Protocol):
    """Named tensors that can be looked over before they are read."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


class Checkpoint:
    """The safetensors files of a directory, opened but not read: a tensor is mapped on request.

    Raises ModelNotFoundError, naming the file, where one is missing, cut short or not what the
    index says.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, Any] = {}  # safe_open has no public type
        self._home: dict[str, str] = {}
        for file, expected in _files(directory).items():
            opened = _open(directory / file)
            stored = list(opened.keys())
            lacking = sorted(set(expected) - set(stored))
            if lacking:
                raise ModelNotFoundError(
                    f"{directory / file} lacks {lacking[0]}, which {INDEX_FILE} says it holds; "
                    f"{_AGAIN}"
                )
            self._files[file] = opened
            self._home |= dict.fromkeys(stored, file)

    def names(self) -> list[str]:
        """Names of all stored tensors."""
        return list(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, without reading it."""
        return tuple(self._files[self._home[name]].get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """The tensor, mapped from its file: no copy is made."""
        tensor: Tensor = self._files[self._home[name]].get_tensor(name)
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a stored tensor, without reading it."""
        return self.get(name).dtype


class _StateDict:
    """The weights of a loaded model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def get(self, name: str) -> Tensor:
        return self._tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype


class _Renamed:
    """A weight source under other names."""

    def __init__(self, source: WeightSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def get(self, name: str) -> Tensor:
        return self._source.get(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._names[name])


def open_weights(
    source: ModelSource,
    config: PretrainedConfig,
    names: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, tuple[str, ...]],
) -> WeightSource:
    """The weights of `names` (name → shape), mapped where the files hold them as the model does.

    A tied weight may stand under any of its `aliases`. Where names or shapes differ (transformers
    renames and converts at load), the model is loaded and its state dict taken. Raises
    UnsupportedModelError where a weight is in neither, or where tied weights differ.
    """
    checkpoint = Checkpoint(source.directory)
    homes = _homes(source, checkpoint, names, aliases)
    if len(homes) == len(names):
        return _Renamed(checkpoint, homes)
    loaded = _load(source, config)
    homes = _homes(source, loaded, names, aliases)
    missing = [name for name in names if name not in homes]
    if missing:
        raise UnsupportedModelError(
            f"{source.name}: its checkpoint holds no {_some(missing)} of the shape that "
            f"config.json gives the model ({list(names[missing[0]])} for the first); use a "
            "complete checkpoint of a causal language model and its own config.json"
        )
    return _Renamed(loaded, homes)


def checkpoint_dtype(source: ModelSource, config: PretrainedConfig) -> torch.dtype:
    """The dtype of the model's floating point weights: the config's, or else that of most of them.

    Raises UnsupportedModelError for a quantised checkpoint and for other kinds of number.
    """
    remedy = "compile the unquantised checkpoint"
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{source.name} is quantised (quantization_config in its config.json); {remedy}"
        )
    checkpoint = Checkpoint(source.directory)
    dtypes = {name: checkpoint.dtype(name) for name in checkpoint.names()}
    for name, dtype in dtypes.items():
        # Buffers such as masks and position ids may be integers; matrices may not.
        if name.endswith("weight") and (not dtype.is_floating_point or dtype.itemsize < 2):
            raise UnsupportedModelError(
                f"{source.name} is quantised ({name} is stored as {dtype_name(dtype)}); {remedy}"
            )
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else _commonest(dtypes.values())
    if dtype not in _FLOATS:
        raise UnsupportedModelError(
            f"{source.name} is in {dtype_name(dtype)}; convert it to one of {', '.join(DType)}"
        )
    return dtype


def _files(directory: Path) -> dict[str, list[str]]:
    """The files of a checkpoint, and the tensors that its index says each one holds."""
    # Where there are both, transformers takes the single file too.
    if (directory / SINGLE_FILE).is_file():
        return {SINGLE_FILE: []}
    index = directory / INDEX_FILE
    if not index.is_file():
        raise ModelNotFoundError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; {_AGAIN}"
        )
    try:
        homes = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files: dict[str, list[str]] = {str(file): [] for file in sorted(set(homes.values()))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotFoundError(
            f"{index} is not an index of safetensors ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error
    for name, file in homes.items():
        files[file].append(name)
    absent = [file for file in files if not (directory / file).is_file()]
    if absent:
        raise ModelNotFoundError(
            f"{directory} lacks {_some(absent)}, which {INDEX_FILE} names; {_AGAIN}"
        )
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelNotFoundError(f"{path} is cut short or damaged ({error}); {_AGAIN}") from error


def _homes(
    source: ModelSource,
    store: _Store,
    names: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, tuple[str, ...]],
) -> dict[str, str]:
    """Where the store holds each weight in the shape wanted, for those that it holds."""
    stored = set(store.names())
    homes = {}
    for name, shape in names.items():
        tied = [n for n in (name, *aliases.get(name, ())) if n in stored]
        for other in tied[1:]:
            # transformers would leave such a pair untied, and the graph has one weight for both.
            if not torch.equal(store.get(tied[0]), store.get(other)):
                raise UnsupportedModelError(
                    f"{source.name}: config.json ties {tied[0]} and {other}, but the checkpoint "
                    "holds different values; set tie_word_embeddings to false in config.json"
                )
        if tied and store.shape(tied[0]) == tuple(shape):
            homes[name] = tied[0]
    return homes


def _load(source: ModelSource, config: PretrainedConfig) -> _StateDict:
    """The model's weights as transformers loads them, without those that it had to make up."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.directory,
            config=config,
            dtype="auto",
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below with the missing ones
            output_loading_info=True,
            trust_remote_code=source.trust_remote_code,
        )
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"{source.name}: transformers can't load its weights ({error}); {_AGAIN}"
        ) from error
    made_up = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    return _StateDict({n: t for n, t in model.state_dict().items() if n not in made_up})


def _commonest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    counts = Counter(dtype for dtype in dtypes if dtype.is_floating_point)
    return max(counts, key=lambda dtype: counts[dtype])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
