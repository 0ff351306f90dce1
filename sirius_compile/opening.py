"""From what `compile_model` is given to a `Source`.

A kind of model is a function that opens it, and returns None for what is of another kind; and a
line in `OPENERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig

from sirius_compile.checkpoint import StateDict, checkpoint_dtype, open_weights
from sirius_compile.config import CompileConfig
from sirius_compile.config_check import check_config, read_generation_config
from sirius_compile.live import check_model, main_dtype
from sirius_compile.models import is_name, load_config, resolve_model
from sirius_compile.source import Source
from sirius_compile.texts import BUILTIN_PROMPTS
from sirius_compile.tokenizer import tokenizer_files
from sirius_runtime.errors import ConfigError

Warn = Callable[[str], None]
Opener = Callable[[Any, CompileConfig, Any, Warn], Source | None]
"""Takes the model, the options, the tokenizer that came with it, and whom to warn."""


def open_source(model: Any, config: CompileConfig, tokenizer: Any, warn: Warn) -> Source:
    """Opens `model`. Raises ConfigError, ModelNotFoundError or UnsupportedModelError, naming the
    reason, for what is no model or can't be compiled.
    """
    for opener in OPENERS:
        if (source := opener(model, config, tokenizer, warn)) is not None:
            return source
    raise AssertionError("the last opener takes everything")


def open_files(model: Any, config: CompileConfig, tokenizer: Any, warn: Warn) -> Source | None:
    """A shipped name, a directory, a hub id or a short name."""
    if not is_name(model):
        return None
    if tokenizer is not None:
        raise ConfigError("tokenizer= goes with a model in memory; a directory brings its own")
    source = resolve_model(
        model,
        revision=config.revision,
        cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code,
    )
    hf_config = load_config(source)
    own_prompts = source.directory / "calibration_prompts.jsonl"
    return Source(
        name=source.name,
        revision=source.revision,
        config=hf_config,
        generation=read_generation_config(source.directory, hf_config, source.name),
        tokenizer_files=tokenizer_files(source),
        prompts=own_prompts if own_prompts.exists() else BUILTIN_PROMPTS,
        dtype=checkpoint_dtype(source, hf_config),
        trust_remote_code=source.trust_remote_code,
        open_weights=lambda wanted: open_weights(source, hf_config, wanted, warn),
    )


def open_live(model: Any, config: CompileConfig, tokenizer: Any, warn: Warn) -> Source:
    """A model in memory, with the tokenizer that came with it."""
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


OPENERS: tuple[Opener, ...] = (open_files, open_live)
"""Asked in this order. The last takes everything, and says what is no model."""
