"""How an operator is registered: one call with its schema, its reference and its fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Kept alive for the life of the process: a collected Library takes its operators with it.
_LIBRARY = torch.library.Library("sirius", "FRAGMENT")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers ``sirius::<schema>``: `reference` on every device, `fake` for tracing.

    Device kernels are added beside the reference with `torch.library.impl`; the reference stays the
    oracle they are tested against.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sirius::{name}", fake, lib=_LIBRARY)


def define_cpu(kernel: Callable[..., Any]) -> None:
    """Registers the CPU kernel of the operator that has the function's name."""
    _LIBRARY.impl(kernel.__name__, kernel, "CPU")


def define_cuda(kernel: Callable[..., Any]) -> None:
    """Registers what runs on CUDA for the operator that has the function's name."""
    _LIBRARY.impl(kernel.__name__, kernel, "CUDA")
