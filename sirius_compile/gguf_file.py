"""Models in GGUF files: weights, config and tokenizer, read by transformers.

Quantised weights are dequantised to the artifact's dtype. If weights are to be nested, that is
float32, from which the integers of a Q8_0 tensor are found again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import ModelNotFoundError, UnsupportedModelError
from sirius_runtime.spec import DType

_PACKAGES = ("gguf", "accelerate")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Keys of the tokens that end a text, and a turn of a chat.
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


@dataclass(frozen=True)
class GgufModel:
    """A model in memory, its tokenizer, and a generation config with its end tokens. `dtype` is the
    program's; the model may be in a wider one.
    """

    model: PreTrainedModel
    dtype: torch.dtype
    tokenizer: Any
    generation: GenerationConfig


def is_gguf(model: str | Path) -> bool:
    """Whether `model` has a GGUF file's name and is not a directory."""
    return str(model).lower().endswith(".gguf") and not Path(model).is_dir()


def load_gguf(path: Path, dtype: DType | None, *, exactly: bool = False) -> GgufModel:
    """Loads a GGUF file in `dtype`; by default that of most of its weights, or bfloat16 if those
    are quantised. `exactly`: the model is in float32, whatever the program's dtype.

    Raises ModelNotFoundError if there is no such file, and UnsupportedModelError, with
    transformers' reason, for an architecture or a type of weights that it can't read.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"{path} does not exist; give a GGUF file on this machine")
    missing = [package for package in _PACKAGES if find_spec(package) is None]
    if missing:
        raise UnsupportedModelError(
            f"{path}: reading GGUF needs {' and '.join(missing)}: pip install "
            f"{' '.join(missing)}; or give the model's directory of safetensors"
        )
    try:
        return _load(path, dtype, exactly)
    except Exception as error:  # bad files may raise any exception in transformers
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnsupportedModelError(
            f"{path}: transformers can't read this GGUF file ({reason:.300}); give the model's "
            "directory of safetensors, which this file was made from"
        ) from error


def _load(path: Path, dtype: DType | None, exactly: bool) -> GgufModel:
    from gguf import GGUFReader

    reader = GGUFReader(path)
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise ValueError(
            f"it is one of {parts.contents()} parts; join them by llama-gguf-split --merge"
        )
    given = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    own = dtype_of(dtype) if dtype else _dtype(reader)
    model = AutoModelForCausalLM.from_pretrained(
        **given, **_unpacked(), dtype=torch.float32 if exactly else own
    ).eval()
    generation = model.generation_config or GenerationConfig.from_model_config(model.config)
    fields = [field for name in _ENDS if (field := reader.get_field(name)) is not None]
    if fields:
        generation.eos_token_id = list(dict.fromkeys(int(field.contents()) for field in fields))
    return GgufModel(model, own, AutoTokenizer.from_pretrained(**given), generation)


def _unpacked() -> dict[str, Any]:
    """The argument that makes transformers dequantise weights that it could keep packed."""
    try:
        from transformers import GgufConfig
    except ImportError:  # an older release always dequantises
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _dtype(reader: Any) -> torch.dtype:
    counts: Counter[str] = Counter()
    for tensor in reader.tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return _FLOATS.get(counts.most_common(1)[0][0], torch.bfloat16)
