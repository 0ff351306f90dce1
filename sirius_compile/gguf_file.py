"""Models in GGUF files: weights, config and tokenizer, read by transformers.

Quantised weights are dequantised to the artifact's dtype. If weights are to be nested, they are
dequantised to float32, from which the integers of a Q8_0 tensor can be recovered exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import ModelNotFoundError, UnsupportedModelError
from sirius_runtime.spec import DType

_BLOCK = 1 << 22  # numbers that are dequantised at once
_PACKAGES = ("gguf", "accelerate")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Keys of the tokens that end a text, and a turn of a chat.
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


@dataclass(frozen=True)
class GgufModel:
    """A model read from a GGUF file.

    `dtype`: the program's dtype; the weights may be in a wider one. `generation`: has the file's
    end tokens. `weights`: the file's weights, each dequantised on request; None for an architecture
    whose tensors transformers merges or splits. Then `model` is the model as transformers loads it.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    tokenizer: Any
    generation: GenerationConfig
    weights: GgufWeights | None
    model: PreTrainedModel | None


class GgufWeights:
    """The tensors of a GGUF file under transformers' names. `get` dequantises blocks of rows on as
    many threads as torch uses.
    """

    def __init__(self, tensors: Mapping[str, Any], processor: Any, dtype: torch.dtype) -> None:
        """`tensors`: GGUFReader's tensors, by transformers' names. `processor`: transformers'
        tensor processor, which undoes the converter's changes to some tensors.
        """
        self._tensors, self._processor, self._dtype = tensors, processor, dtype

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def get(self, name: str) -> Tensor:
        from gguf import dequantize

        tensor = self._tensors[name]
        if len(tensor.shape) == 1:
            return self._restored(dequantize(tensor.data, tensor.tensor_type), tensor).to(
                self._dtype
            )
        values = torch.empty(self.shape(name), dtype=self._dtype)
        rows = max(1, _BLOCK // max(1, values[0].numel()))

        def fill(start: int) -> None:
            part = dequantize(tensor.data[start : start + rows], tensor.tensor_type)
            values[start : start + rows] = torch.from_numpy(
                np.require(part, requirements=["C", "W"])
            )

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, range(0, len(values), rows)))
        # NumPy has no bfloat16. Integers of the same size do, because the converter only permuted
        # the rows of matrices.
        bits = values.view(torch.int16 if self._dtype.itemsize == 2 else torch.int32)
        return self._restored(bits.numpy(), tensor).view(self._dtype)

    def _restored(self, values: Any, tensor: Any) -> Tensor:
        """`values` without the converter's changes."""
        done = self._processor.process(weights=values, name=tensor.name).weights
        return torch.from_numpy(np.require(done, requirements=["C", "W"]))


def is_gguf(model: str | Path) -> bool:
    """Whether `model` has a GGUF file's name and is not a directory."""
    return str(model).lower().endswith(".gguf") and not Path(model).is_dir()


def load_gguf(path: Path, dtype: DType | None, *, exactly: bool = False) -> GgufModel:
    """Loads a GGUF file for a program in `dtype`, by default the dtype of most of its weights, or
    bfloat16 if those are quantised. `exactly`: weights are dequantised to float32, whatever the
    program's dtype.

    Raises ModelNotFoundError if there is no such file, and UnsupportedModelError, with
    transformers' reason, for an architecture or a type of weights that transformers can't read.
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
            f"it is one of {parts.contents()} parts; join them with llama-gguf-split --merge"
        )
    given = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    program_dtype = dtype_of(dtype) if dtype else _dtype(reader)
    stored = torch.float32 if exactly else program_dtype
    config, model = AutoConfig.from_pretrained(**given), None
    weights = _weights(reader, config, stored)
    if weights is None:
        model = AutoModelForCausalLM.from_pretrained(**given, **_unpacked(), dtype=stored).eval()
        config = model.config
    generation = getattr(model, "generation_config", None)
    generation = generation or GenerationConfig.from_model_config(config)
    fields = [field for name in _ENDS if (field := reader.get_field(name)) is not None]
    if fields:
        generation.eos_token_id = list(dict.fromkeys(int(field.contents()) for field in fields))
    tokenizer = AutoTokenizer.from_pretrained(**given)
    return GgufModel(config, program_dtype, tokenizer, generation, weights, model)


def _weights(reader: Any, config: PretrainedConfig, dtype: torch.dtype) -> GgufWeights | None:
    """The file's tensors, if each is one whole weight of the model; else None."""
    try:
        from transformers import modeling_gguf_pytorch_utils as theirs

        architecture = str(reader.get_field("general.architecture").contents())
        kind = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)
        simple = (theirs.TensorProcessor, theirs.LlamaTensorProcessor, theirs.Gemma2TensorProcessor)
        names = theirs.get_gguf_hf_weights_map
    except (ImportError, AttributeError):  # another release of transformers
        return None
    if kind not in simple:
        return None
    processor = kind(config=config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    known = names(model, processor)
    tensors = {known[t.name]: t for t in reader.tensors if t.name in known}
    return GgufWeights(tensors, processor, dtype)


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
