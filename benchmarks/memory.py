"""Memory for a benchmark's weights, laid out like an artifact's."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes


def in_large_pages(count: int, dtype: torch.dtype) -> Tensor:
    """`count` zeros on the CPU, in pages of 2 MiB if the system supports them, like an artifact's
    weights (`artifact_zip.map_file`).
    """
    size = max(1, count * dtype.itemsize)
    buffer = mmap.mmap(-1, size + PAGE, **_private())
    with contextlib.suppress(AttributeError, OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE
    return whole[start : start + count * dtype.itemsize].view(dtype)


def _private() -> dict[str, int]:
    """The arguments of a private mapping; only these get large pages."""
    try:
        return {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    except AttributeError:  # Windows
        return {}
