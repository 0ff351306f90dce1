"""torch dtypes by the names that specs and manifests use."""

from __future__ import annotations

import torch

from sirius_runtime.errors import ArtifactError


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` → ``float32``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """``float32`` → ``torch.float32``; raises ArtifactError for an unknown name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"unknown dtype {name!r}")
    return dtype
