"""The weights of a model directory, mapped from its safetensors files one at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from sirius_compile.capture import Wanted
from sirius_compile.config_check import read_object
from sirius_compile.live import MERGE
from sirius_compile.models import INDEX_FILE, SINGLE_FILE, ModelSource, whole_config
from sirius_compile.text_model import text_config, text_names
from sirius_compile.workspace import Workspace
from sirius_runtime.dtypes import dtype_name, dtype_of
from sirius_runtime.errors import ModelNotFoundError, UnsupportedModelError
from sirius_runtime.spec import DType, WeightSpec

_FLOATS = tuple(dtype_of(name) for name in DType)
_AGAIN = "download or save the model again"
_HARMLESS = (r"rotary_emb\.inv_freq$", r"attn\.(masked_)?bias$", r"position_ids$")
"""Buffers that older releases of transformers saved, and that models now compute."""
_ADAPTER = re.compile(r"\.lora_|\.base_layer\.|\.modules_to_save\.")
_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")


class WeightSource(Protocol):
    """Weights by the names of the model's state dict."""

    def get(self, name: str) -> Tensor: ...

    def dtype(self, name: str) -> torch.dtype: ...


class Store(WeightSource, Protocol):
    """A weight source whose names and shapes are known before tensors are read."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


class Checkpoint:
    """The safetensors files of a directory, opened but not read: a tensor is mapped on request.

    Raises ModelNotFoundError, with the file's name, if a file is missing, is truncated, or lacks a
    tensor that the index lists.
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
                    f"{directory / file} lacks {lacking[0]}, which {INDEX_FILE} lists for it; "
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


class Kept:
    """A cache for a slow weight source: each weight is read from the source once, and kept in the
    workspace on disk, or in memory without a workspace.
    """

    def __init__(self, source: WeightSource, wanted: Wanted, workspace: Workspace | None) -> None:
        self._source, self._shapes, self._workspace = source, wanted.shapes, workspace
        self._loaded: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        if self._workspace is None:
            if name not in self._loaded:
                self._loaded[name] = self._source.get(name)
            return self._loaded[name]
        spec = WeightSpec(f"as read: {name}", dtype_name(self.dtype(name)), self._shapes[name])
        return self._workspace.weight(spec, lambda: self._source.get(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)


class StateDict:
    """The weights of a model in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def get(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device and has no values; load the model's weights first"
            )
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype


class _Renamed:
    """Tensors of a store under other names: `names` maps each to its name in the store."""

    def __init__(self, source: Store, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def names(self) -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def get(self, name: str) -> Tensor:
        return self._source.get(self._names[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._names[name])


def open_weights(
    source: ModelSource,
    config: PretrainedConfig,
    wanted: Wanted,
    warn: Callable[[str], None] = lambda warning: None,
) -> WeightSource:
    """The weights of a captured graph, mapped from the files if these have the model's names and
    shapes.

    A tied weight may be stored under any of its names. If names or shapes differ (transformers
    renames and converts at load), transformers loads the model, and its state dict is used. `warn`
    is called with a message about tensors of the checkpoint that are left out. Raises
    UnsupportedModelError if a weight is missing, if tied weights differ, or if an adapter or whole
    layers would be left out.
    """
    names, aliases = wanted.shapes, wanted.aliases
    files = Checkpoint(source.directory)
    checkpoint, prefixes = _text_part(source, files, config, wanted, warn)
    homes = _homes(source.name, checkpoint, names, aliases)
    if len(homes) == len(names):
        _check_left_over(source, config, wanted, checkpoint.names(), warn)
        return _Renamed(checkpoint, homes)
    loaded, unexpected = _load(source, config, prefixes)
    _check_left_over(source, config, wanted, unexpected, warn)
    return open_store(source.name, loaded, wanted)


def open_store(source: str, store: Store, wanted: Wanted) -> WeightSource:
    """The weights of a captured graph, from a store with the model's names. `source`: the model's
    name in messages. Raises UnsupportedModelError if a weight is missing.
    """
    names = wanted.shapes
    homes = _homes(source, store, names, wanted.aliases)
    missing = [name for name in names if name not in homes]
    if missing:
        raise UnsupportedModelError(
            f"{source}: its checkpoint holds no {_some(missing)} in the shape that config.json "
            f"describes ({list(names[missing[0]])} for the first); use a complete checkpoint of a "
            "causal language model and its own config.json"
        )
    return _Renamed(store, homes)


def checkpoint_dtype(source: ModelSource, config: PretrainedConfig) -> torch.dtype:
    """The dtype of the model's floating point weights: the config's, or else the commonest one.

    Raises UnsupportedModelError for a quantised checkpoint and for unsupported dtypes.
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
    # If both exist, the single file is used, as in transformers.
    if (directory / SINGLE_FILE).is_file():
        return {SINGLE_FILE: []}
    index = directory / INDEX_FILE
    if not index.is_file():
        raise ModelNotFoundError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; {_AGAIN}"
        )
    try:
        homes = dict(read_object(index, _AGAIN)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelNotFoundError(
            f"{index} is not an index of safetensors ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error
    files: dict[str, list[str]] = {}
    for name, file in homes.items():
        if not _is_within(file):
            raise ModelNotFoundError(
                f"{index} says that {name} is in {file!r:.80}, which is not a file in this folder; "
                f"{_AGAIN}"
            )
        files.setdefault(file, []).append(name)
    files = dict(sorted(files.items()))
    absent = [file for file in files if not (directory / file).is_file()]
    if absent:
        raise ModelNotFoundError(
            f"{directory} lacks {_some(absent)}, which {INDEX_FILE} lists; {_AGAIN}"
        )
    return files


def _is_within(file: Any) -> bool:
    """Whether a file that an index names is in the index's folder (or linked from it)."""
    if not isinstance(file, str) or not file or "\0" in file:
        return False
    path = PurePath(file)
    return not path.is_absolute() and ".." not in path.parts


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelNotFoundError(f"{path} is cut short or damaged ({error}); {_AGAIN}") from error


def _homes(
    source: str,
    store: Store,
    names: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, tuple[str, ...]],
) -> dict[str, str]:
    """The stored name of each weight that the store holds in the wanted shape.

    Raises UnsupportedModelError if tied weights are stored with different values.
    """
    stored = set(store.names())
    homes = {}
    for name, shape in names.items():
        tied = [n for n in (name, *aliases.get(name, ())) if n in stored]
        for other in tied[1:]:
            # transformers would leave such a pair untied, but the graph has one weight for both.
            if not torch.equal(store.get(tied[0]), store.get(other)):
                raise UnsupportedModelError(
                    f"{source}: config.json ties {tied[0]} and {other}, but the checkpoint "
                    "holds different values; set tie_word_embeddings to false in config.json"
                )
        if tied and store.shape(tied[0]) == tuple(shape):
            homes[name] = tied[0]
    return homes


def _text_part(
    source: ModelSource,
    files: Checkpoint,
    config: PretrainedConfig,
    wanted: Wanted,
    warn: Callable[[str], None],
) -> tuple[Store, dict[str, str]]:
    """The tensors of a multimodal checkpoint's text model, under the text model's names, and the
    renaming (pattern → replacement) that transformers needs to load them. For a text-only model,
    all tensors and no renaming.
    """
    if text_config(whole_config(source)) is None:
        return files, {}
    stored = files.names()
    found, prefix = text_names(stored, wanted.names, wanted.base)
    if prefix is None:
        return files, {}
    # Includes tensors with the prefix that the text model does not use, for `_check_left_over`.
    of_text = {
        name: f"{wanted.base}.{name.removeprefix(prefix)}"
        for name in stored
        if name.startswith(prefix)
    } | found
    others = [name for name in stored if name not in of_text]
    if others:
        parts = sorted({name.removeprefix("model.").split(".")[0] for name in others})
        warn(
            f"{source.name} is multimodal: only its text model (model type "
            f"{config.model_type!r}) is compiled, and {len(others)} tensors are left out "
            f"({_some(parts)})"
        )
    heads = {there: name for there, name in found.items() if not there.startswith(prefix)}
    patterns = {rf"^{re.escape(there)}$": name for there, name in heads.items()}
    patterns[rf"^{re.escape(prefix)}"] = f"{wanted.base}."
    return _Renamed(files, {name: there for there, name in of_text.items()}), patterns


def _check_left_over(
    source: ModelSource,
    config: PretrainedConfig,
    wanted: Wanted,
    stored: Iterable[str],
    warn: Callable[[str], None],
) -> None:
    """Warns about stored tensors that the model does not use, which transformers would drop.

    Raises UnsupportedModelError if they belong to an adapter or to whole layers.
    """
    ignored = (*wanted.ignored, *_HARMLESS)
    left = [
        name
        for name in stored
        if name not in wanted.names and not any(re.search(p, name) for p in ignored)
    ]
    for name in left:
        if _ADAPTER.search(name):
            raise UnsupportedModelError(
                f"{source.name}: its checkpoint holds {name}, which belongs to an adapter and "
                f"would be left out; {MERGE}"
            )
    layers = _layers(wanted.names)
    more = int(getattr(config, "num_nextn_predict_layers", None) or 0)
    for name in left:
        for match in _LAYER.finditer(name):
            known = layers.get(name[: match.start()])
            if known is not None and int(match[1]) >= known + more:
                raise UnsupportedModelError(
                    f"{source.name}: its checkpoint holds {name} of layer {match[1]}, but "
                    f"config.json gives the model {known} layers (num_hidden_layers, counted from "
                    "layer 0); use the checkpoint's own config.json"
                )
    if left:
        warn(f"{source.name} holds tensors that the model does not use: {_some(left)}")


def _layers(names: Iterable[str]) -> dict[str, int]:
    """The number of layers in each module list, by the name's prefix before the layer number."""
    found: dict[str, int] = {}
    for name in names:
        for match in _LAYER.finditer(name):
            before = name[: match.start()]
            found[before] = max(found.get(before, 0), int(match[1]) + 1)
    return found


def _load(
    source: ModelSource, config: PretrainedConfig, prefixes: Mapping[str, str]
) -> tuple[StateDict, list[str]]:
    """The model's weights as transformers loads them, except weights that it had to initialise; and
    the stored names that it did not use. `prefixes`: the renaming of `_text_part`.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source.directory,
            config=config,
            dtype="auto",
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below with the missing ones
            output_loading_info=True,
            trust_remote_code=source.trust_remote_code,
            **({"key_mapping": dict(prefixes)} if prefixes else {}),
        )
    except Exception as error:  # bad files may raise any exception in transformers
        raise UnsupportedModelError(
            f"{source.name}: transformers can't load its weights ({error}); {_AGAIN}"
        ) from error
    initialised = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    weights = StateDict({n: t for n, t in model.state_dict().items() if n not in initialised})
    return weights, [] if prefixes else sorted(info["unexpected_keys"])


def _commonest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    counts = Counter(dtype for dtype in dtypes if dtype.is_floating_point)
    return max(counts, key=lambda dtype: counts[dtype])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
