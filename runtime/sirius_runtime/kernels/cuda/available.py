"""Whether the Triton kernels can be used on a device, and the one warning where they can't."""

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
    """The module `name` beside this one, which launches kernels; None where the references are to
    be used.
    """
    if switched_off():
        return None
    with _lock:  # one warning, however many threads come at once
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
            f"the CUDA kernels can't be used: {error}. The reference operators, which read what "
            f"they skip, take their place; set {VARIABLE}=0 to choose them without this warning",
            KernelWarning,
            stacklevel=2,
        )
        return False
    return True


def _require(device: torch.device) -> None:
    """Raises BackendError, with the reason, where Triton can't launch on the device."""
    if torch.version.hip is not None:
        raise BackendError("they are for NVIDIA GPUs, and this PyTorch is built for AMD's")
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
    except Exception as error:  # whatever Triton's driver meets: no C compiler, no libcuda, …
        raise BackendError(
            f"Triton does not start ({error}); it needs a C compiler and the NVIDIA driver"
        ) from error
