"""Opens the model that `compile_model` is given, as a `Source`.

Each kind of model has a function that opens it, listed in `OPENERS`. It returns None for a model of
another kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from sirius_compile.adapters import Adapter, merged, read_adapter
from sirius_compile.checkpoint import StateDict, checkpoint_dtype, open_store, open_weights
from sirius_compile.config import CompileConfig
from sirius_compile.config_check import check_config, read_generation_config
from sirius_compile.gguf_file import is_gguf, load_gguf
from sirius_compile.live import check_model, main_dtype
from sirius_compile.models import (
    ModelSource,
    is_adapter,
    is_name,
    load_config,
    resolve_model,
    whole_config,
)
from sirius_compile.source import Source
from sirius_compile.text_model import text_config
from sirius_compile.texts import BUILTIN_PROMPTS
from sirius_compile.tokenizer import tokenizer_files
from sirius_runtime.command_line import read_path
from sirius_runtime.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from sirius_runtime.spec import DType

Warn = Callable[[str], None]
Opener = Callable[[Any, CompileConfig, Any, Warn], Source | None]
"""Takes the model, the options, the tokenizer of a model in memory, and a function for warnings."""


def open_source(model: Any, config: CompileConfig, tokenizer: Any, warn: Warn) -> Source:
    """Opens `model`. Raises ConfigError, ModelNotFoundError or UnsupportedModelError, with the
    reason, if it is not a model or can't be compiled.
    """
    if not is_name(model) and (config.adapter is not None or config.base is not None):
        raise ConfigError(
            "--adapter and --base apply to models in files; merge the adapter into a model in "
            "memory with peft"
        )
    for opener in OPENERS:
        if (source := opener(model, config, tokenizer, warn)) is not None:
            return source
    raise AssertionError("the last opener takes everything")


def open_gguf(model: Any, config: CompileConfig, tokenizer: Any, warn: Warn) -> Source | None:
    """A GGUF file."""
    if not is_name(model) or not is_gguf(model):
        return None
    _check_alone(tokenizer)
    given = {"--adapter": config.adapter, "--base": config.base, "--revision": config.revision}
    for flag, value in given.items():
        if value is not None:
            raise ConfigError(f"{flag} does not apply to a GGUF file; give a directory or a hub id")
    loaded = load_gguf(
        read_path(model),
        None if config.dtype is None else DType(config.dtype),
        exactly=config.nested_bits is not None,
    )
    name, files = Path(model).name, (read_path(model),)
    weights = loaded.weights
    if weights is None:
        source = open_live(loaded.model, config, loaded.tokenizer, warn)
        return replace(
            source, name=name, generation=loaded.generation, dtype=loaded.dtype, files=files
        )
    check_config(loaded.config, name)
    return Source(
        name=name,
        revision=None,
        config=loaded.config,
        generation=loaded.generation,
        tokenizer_files=tokenizer_files(loaded.tokenizer),
        prompts=BUILTIN_PROMPTS,
        dtype=loaded.dtype,
        trust_remote_code=False,
        open_weights=lambda wanted: open_store(name, weights, wanted),
        files=files,
        slow=True,
    )


def open_files(model: Any, config: CompileConfig, tokenizer: Any, warn: Warn) -> Source | None:
    """A shipped name, a directory, a hub id or a short name, of a model or of an adapter."""
    if not is_name(model):
        return None
    _check_alone(tokenizer)
    source = _resolve(model, config, revision=config.revision, adapters=config.adapter is None)
    if is_adapter(source.directory):
        adapter = read_adapter(source.directory)
        return _open_adapted(_base_of(adapter, source, config), adapter, config, warn)
    if config.base is not None:
        raise ConfigError(f"--base applies to adapters, but {source.name} is a model; leave it out")
    if config.adapter is not None:
        return _open_adapted(source, read_adapter(config.adapter), config, warn)
    hf_config = load_config(source)
    return Source(
        name=source.name,
        revision=source.revision,
        config=hf_config,
        generation=read_generation_config(source.directory, hf_config, source.name),
        tokenizer_files=tokenizer_files(source),
        prompts=_prompts(source),
        dtype=checkpoint_dtype(source, hf_config),
        trust_remote_code=source.trust_remote_code,
        open_weights=lambda wanted: open_weights(source, hf_config, wanted, warn),
        files=(source.directory,),
    )


def _check_alone(tokenizer: Any) -> None:
    if tokenizer is not None:
        raise ConfigError("tokenizer= applies to a model in memory; other models have their own")


def _resolve(
    model: str | Path,
    config: CompileConfig,
    *,
    revision: str | None = None,
    adapters: bool = False,
    trusted: bool = True,
) -> ModelSource:
    return resolve_model(
        model,
        revision=revision,
        cache_dir=config.cache_dir,
        trust_remote_code=trusted and config.trust_remote_code,
        adapters=adapters,
    )


def _prompts(source: ModelSource) -> Path:
    own = source.directory / "calibration_prompts.jsonl"
    return own if own.exists() else BUILTIN_PROMPTS


def _base_of(adapter: Adapter, source: ModelSource, config: CompileConfig) -> ModelSource:
    """An adapter's base model. Its code is trusted only if the user named the model."""
    base = config.base or adapter.base
    if base is None:
        raise ConfigError(f"{source.name} is an adapter that names no base model: pass --base")
    try:
        return _resolve(base, config, trusted=config.base is not None)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the base model of {source.name}: {error}; pass another with --base"
        ) from error


def _open_adapted(base: ModelSource, adapter: Adapter, config: CompileConfig, warn: Warn) -> Source:
    """A base model with an adapter merged into it, and the adapter's tokenizer if it has one."""
    hf_config = load_config(base)
    checkpoint_dtype(base, hf_config)  # raises if the base is quantised
    if text_config(whole_config(base)) is not None:
        raise UnsupportedModelError(
            f"{base.name} is multimodal, and adapters can be merged into text models only; merge "
            "the adapter with peft, save the whole model, and compile that"
        )
    has_tokenizer = (adapter.folder / "tokenizer.json").is_file()
    tokenizer_source = replace(base, directory=adapter.folder) if has_tokenizer else base
    source = open_live(merged(base, adapter), config, None, warn)
    return replace(
        source,
        name=f"{base.name} + {adapter.folder.name}",
        revision=base.revision,
        generation=read_generation_config(base.directory, hf_config, base.name),
        tokenizer_files=tokenizer_files(tokenizer_source),
        prompts=_prompts(base),
        files=(base.directory, adapter.folder),
    )


def open_live(model: Any, config: CompileConfig, tokenizer: Any, warn: Warn) -> Source:
    """A model in memory, and its tokenizer if one is given."""
    model = check_model(model)
    name = model.config.name_or_path or type(model).__name__
    check_config(model.config, name)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return Source(
        name=name,
        revision=None,
        config=model.config,
        generation=model.generation_config or GenerationConfig.from_model_config(model.config),
        tokenizer_files=tokenizer_files(tokenizer),
        prompts=BUILTIN_PROMPTS,
        dtype=main_dtype(model),
        trust_remote_code=True,  # its code has run already
        open_weights=lambda wanted: StateDict(tensors),
        live=model,
    )


OPENERS: tuple[Opener, ...] = (open_gguf, open_files, open_live)
"""Tried in this order. The last takes everything, and raises ConfigError if it is not a model."""
