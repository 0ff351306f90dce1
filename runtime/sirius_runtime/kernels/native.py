"""Loads the kernel library, decides whether to use it, and warns once if it is missing."""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from sirius_runtime.cache import cache_folder
from sirius_runtime.errors import BackendError
from sirius_runtime.kernels.build import InstructionSet, instruction_sets, library

VARIABLE = "SIRIUS_KERNELS"
"""Environment variable. ``0`` turns the kernels off, on CUDA too. The name of an instruction set
(``avx2``, …) compiles for it. Unset or empty, the best that the CPU has is taken."""

_P, _I, _N, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "sirius_linears": [_I, _P, _N, _N, _P, _N, _I],
    "sirius_linear_by_inputs": [_I, _P, _N, _N, _P, _I],
    "sirius_sparse_linear": [_I, _P, _F, _I],
    "sirius_mlp": [_I, _P, _I, _N, _I, _F, _I],
    "sirius_nested_linears": [_I, _P, _N, _N, _P, _N, _I],
    "sirius_nested_by_inputs": [_I, _P, _F, _I],
    "sirius_nested_mlp": [_I, _P, _I, _N, _I, _F, _I],
    "sirius_unnest": [_I, _P, _P, _I],
    "sirius_nest": [_I, _P, _I],
    "sirius_activity": [_I, _P, _P, _N, _N, _I],
    "sirius_gated": [_I, _I, _P, _N, _P, _N, _P, _I],
    "sirius_statistic": [_I, _P, _P, _I],
    "sirius_rms_norm": [_I, _P, _N, _P, _N, _P, _P, _N, _F, _P, _I],
    "sirius_rotate": [_I, _P, _P, _I],
    "sirius_attention": [_I, _P, _N, _N, _F, _F, _I, _I],
}


class KernelWarning(RuntimeWarning):
    """The kernels can't be used, so the slower references run instead."""


_lock = threading.Lock()
_loaded: dict[InstructionSet | None, ctypes.CDLL | None] = {}
_chosen: InstructionSet | None = None  # set by `using`; overrides the environment variable
_off = 0  # how many contexts of `references` are active
_listener = threading.local()

Heard = Callable[[Callable[..., int], tuple[Any, ...]], None]
"""A listener to calls of the library: it gets the function and its arguments."""


def kernels() -> ctypes.CDLL | None:
    """The library, built and loaded at the first call; None if the references must be used."""
    if switched_off():
        return None
    heard: Heard | None = getattr(_listener, "heard", None)
    if heard is None:
        return _library()
    library = _library()
    return None if library is None else cast(ctypes.CDLL, _Listening(library, heard))


@contextmanager
def listening(heard: Heard) -> Iterator[None]:
    """A context in which `heard` is called before each call of the library by this thread."""
    _listener.heard = heard
    try:
        yield
    finally:
        _listener.heard = None


class _Listening:
    """The library, with a listener that is called before each of its functions."""

    def __init__(self, library: ctypes.CDLL, heard: Heard) -> None:
        self._own, self._heard = library, heard

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._own, name)
        if name not in _SIGNATURES:
            return function

        def call(*arguments: Any) -> int:
            self._heard(function, arguments)
            return int(function(*arguments))

        return call


def _library() -> ctypes.CDLL | None:
    try:
        return _loaded[_chosen]
    except KeyError:
        with _lock:  # other threads wait for the one that builds
            if _chosen not in _loaded:
                _loaded[_chosen] = _load(_chosen)
            return _loaded[_chosen]


def switched_off() -> bool:
    """Whether a context of `references` is active."""
    return _off > 0


@contextmanager
def references() -> Iterator[None]:
    """A context in which operators run their plain-PyTorch references, on all threads."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


@contextmanager
def using(isa: InstructionSet) -> Iterator[None]:
    """A context in which the kernels are those compiled for `isa`, on all threads."""
    global _chosen
    before, _chosen = _chosen, isa
    try:
        yield
    finally:
        _chosen = before


def _load(isa: InstructionSet | None) -> ctypes.CDLL | None:
    wish = os.environ.get(VARIABLE, "")
    if isa is None and wish == "0":
        return None
    try:
        return _bind(library(isa or _wished(wish), cache_folder()))
    except BackendError as error:
        warnings.warn(
            f"the CPU kernels can't be used: {error}. The slower reference operators run instead; "
            f"set {VARIABLE}=0 to choose them without this warning",
            KernelWarning,
            stacklevel=2,
        )
        return None


def _wished(wish: str) -> InstructionSet:
    able = instruction_sets()
    if not wish:
        return able[0]
    if wish not in able:
        raise BackendError(f"{VARIABLE} must be 0 or one of {', '.join(able)} here, got {wish!r}")
    return InstructionSet(wish)


def _bind(path: Path) -> ctypes.CDLL:
    try:
        bound = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(bound, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        bound.sirius_reason.argtypes, bound.sirius_reason.restype = [], ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise BackendError(f"{path} can't be loaded ({error}); delete it") from error
    bound.sirius_read.argtypes, bound.sirius_read.restype = [_P, _N, _I], ctypes.c_uint64
    return bound
