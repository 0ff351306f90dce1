"""Whether the Triton kernels can be used on a device; warns once if they can't."""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from types import ModuleType

import torch

from sirius_runtime.errors import BackendError
from sirius_runtime.kernels.native import VARIABLE, KernelWarning, switched_off

_LEAST_CAPABILITY = (8, 0)  # the first with bfloat16 in its tensor cores
_lock = threading.Lock()


def launchers(name: str, device: torch.device) -> ModuleType | None:
    """The module `name` of this package, which launches kernels; None if the references must be
    used.
    """
    if switched_off():
        return None
    with _lock:  # several threads still give only one warning
        usable = _usable(device)
    return importlib.import_module(f"sirius_runtime.kernels.cuda.{name}") if usable else None


@functools.cache
def _usable(device: torch.device) -> bool:
    if os.environ.get(VARIABLE) == "0":
        return False
    try:
        _require(device)
    except BackendError as error:
        warnings.warn(
            f"the CUDA kernels can't be used: {error}. The slower reference operators run instead; "
            f"set {VARIABLE}=0 to choose them without this warning",
            KernelWarning,
            stacklevel=2,
        )
        return False
    return True


def _require(device: torch.device) -> None:
    """Raises BackendError, with the reason, if Triton can't launch on the device."""
    if torch.version.hip is not None:
        raise BackendError("they need an NVIDIA GPU, and this PyTorch is built for AMD GPUs")
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        least, own = (".".join(map(str, c)) for c in (_LEAST_CAPABILITY, capability))
        raise BackendError(f"they need compute capability {least}, and {device} has {own}")
    try:
        import triton
    except ImportError as error:
        raise BackendError(
            f"Triton can't be imported ({error}); install it with `pip install triton`"
        ) from error
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # Triton's driver raises many types: no C compiler, no libcuda, …
        raise BackendError(
            f"Triton can't start ({error}); it needs a C compiler and the NVIDIA driver"
        ) from error
