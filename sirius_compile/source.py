"""A model to compile, of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from sirius_compile.capture import Wanted
from sirius_compile.checkpoint import WeightSource


@dataclass(frozen=True)
class Source:
    """A model's config, its tokenizer, and a function that opens its weights.

    `prompts`: the file of its calibration prompts. `dtype`: the checkpoint's. `open_weights`: opens
    the weights that a captured graph reads. `live`: the model itself, if it is in memory. `files`:
    the folders and files that it was read from; empty for a model in memory. `slow`: whether
    reading a weight takes long, as dequantizing it does.
    """

    name: str
    revision: str | None
    config: PretrainedConfig
    generation: GenerationConfig
    tokenizer_files: Mapping[str, bytes]
    prompts: Path
    dtype: torch.dtype
    trust_remote_code: bool
    open_weights: Callable[[Wanted], WeightSource]
    live: PreTrainedModel | None = None
    files: tuple[Path, ...] = ()
    slow: bool = False
