"""Keeps the same weights of a 16-bit model in float32 as transformers does.

Some modules create a weight in float32 whatever the model's dtype (routers of mixtures). Some model
classes list weights that `from_pretrained` converts (`_keep_in_fp32_modules_strict`, and
`_keep_in_fp32_modules` for float16). The forward casts accordingly, so a captured graph is valid
for these dtypes only. The model gets them before it is traced.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sirius_runtime.graph import CAPTURE_DTYPE


def keep_as_loaded(model: Any, dtype: torch.dtype) -> None:
    """In a model built in `CAPTURE_DTYPE`, converts to float32 the same weights that
    `from_pretrained(dtype=dtype)` keeps in float32. float32 is treated like bfloat16, because the
    program may later run in bfloat16.
    """
    plan = model._get_dtype_plan(torch.bfloat16 if dtype is torch.float32 else dtype)
    if not plan:
        return
    pattern = re.compile("|".join(f"(?:{glob.replace('*', '.*')})" for glob in plan))
    floats = (name for name, tensor in stored(model) if tensor.is_floating_point())
    _convert(model, {name: torch.float32 for name in floats if pattern.search(name)})


def keep_as_found(model: nn.Module, live: nn.Module, dtype: torch.dtype) -> None:
    """Gives a model built in `CAPTURE_DTYPE` the dtypes of the model `live`. `dtype`: the main
    dtype of `live`, for which `CAPTURE_DTYPE` stands.
    """
    found = {name: tensor.dtype for name, tensor in stored(live)}
    _convert(model, {name: CAPTURE_DTYPE if d is dtype else d for name, d in found.items()})


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, under all their names."""
    persistent = set(model.state_dict())
    for group in (model.named_parameters, model.named_buffers):
        for name, tensor in group(remove_duplicate=False):
            if name in persistent:
                yield name, tensor


def _convert(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Converts tensors by name; tied tensors stay tied."""
    converted: dict[int, Tensor] = {}
    for name, tensor in list(stored(model)):
        wanted = dtypes.get(name, tensor.dtype)
        if tensor.dtype is wanted:
            continue
        new = converted.get(id(tensor))
        if new is None:
            new = tensor.detach().to(wanted)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            converted[id(tensor)] = new
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        table = module._parameters if leaf in module._parameters else module._buffers
        table[leaf] = new  # type: ignore[assignment]
