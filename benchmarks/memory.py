"""Memory for a benchmark's weights, as the runtime has it for an artifact's."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

PAGE = 2 << 20  # bytes


def in_large_pages(count: int, dtype: torch.dtype) -> Tensor:
    """`count` numbers, zero, on the CPU, in pages of 2 MiB where the system has them: so an
    artifact's weights lie where the file system keeps such pages (`artifact_zip.map_file`).
    """
    size = max(1, count * dtype.itemsize)
    buffer = mmap.mmap(-1, size + PAGE, **_private())
    with contextlib.suppress(AttributeError, OSError):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE
    return whole[start : start + count * dtype.itemsize].view(dtype)


def _private() -> dict[str, int]:
    """The arguments of a mapping that no other process shares: only such have large pages."""
    try:
        return {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    except AttributeError:  # Windows
        return {}
