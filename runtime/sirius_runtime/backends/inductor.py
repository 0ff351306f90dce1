"""Entries compiled by torch.compile, which fuses PyTorch's operators and calls `sirius::` ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import TorchDynamoException

from sirius_runtime.backends.eager import EagerBackend, blaming_the_graph
from sirius_runtime.backends.inductor_cache import check_name, keeps_code_in
from sirius_runtime.backends.period import Progress
from sirius_runtime.backends.rewrite import with_linears
from sirius_runtime.cache import CACHE_VARIABLE, cache_folder, private_folder
from sirius_runtime.errors import BackendError
from sirius_runtime.kernels.build import compiler
from sirius_runtime.spec import JSON, ProgramSpec

_VARYING = frozenset("BTRMS")
"""Shape letters of an entry whose extent differs from call to call: rows, tokens, rows of the tree
mask, slots of the block and of the caches. The other letters are constants of the program.
"""

CACHES = ("k_cache", "v_cache")
"""Inputs that an entry writes to. They are passed without a copy, which would lose the writes.
Their strides already follow from their shapes.
"""

Bucket = tuple[str, ...]
"""The varying letters whose extent is 1."""


class InductorBackend(EagerBackend):
    """As `EagerBackend`, with each entry compiled once per *bucket* of shapes.

    A bucket says which extents are 1 (one row, one token) and leaves all others dynamic. Code for
    one token is worth compiling separately; code for 15 and for 16 tokens differs only in a loop
    bound. Drafts are not padded to a larger size: the full path would verify tokens that do not
    exist. So an entry has few buckets. Prompts, periods, trees and caches of any length share them;
    nothing is recompiled during a generation.

    The `sirius::` operators are opaque to the compiler: their kernels still skip weights and write
    the caches in place. Inductor's code is kept in the folder ``inductor`` of the user's cache
    folder (``$SIRIUS_CACHE``, else ``~/.cache/sirius``), where the next process finds it.
    """

    explains = False

    def __init__(
        self,
        program: ProgramSpec,
        documents: Mapping[str, JSON],
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Raises BackendError where inductor finds no compiler or no folder to keep its code in."""
        super().__init__(program, documents, weights, dtype=dtype, device=device)
        self._progress, self._folder = progress, cache_folder() / "inductor"
        self._shapes = {e.name: {i.name: i.shape for i in e.inputs} for e in program.entries}
        self._compiled: dict[tuple[str, Bucket], Callable[..., Any]] = {}
        if device.type == "cpu":
            try:
                compiler()
            except BackendError as error:
                raise BackendError(f"{error}; or use backend eager") from error
        try:
            self._folder = private_folder(self._folder, deep=True)
            check_name(self._folder, CACHE_VARIABLE)
        except OSError as error:
            raise BackendError(
                f"compiled code can't be kept in {self._folder} ({error}); name another folder by "
                f"the environment variable {CACHE_VARIABLE}"
            ) from error

    @property
    def buckets(self) -> list[tuple[str, Bucket]]:
        """The compiled (entry, bucket) pairs so far."""
        return list(self._compiled)

    @torch.inference_mode()
    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = {n: value if n in CACHES else _dense(value) for n, value in inputs.items()}
        arguments = self._entries[entry].arguments(inputs)
        bucket = self._bucket(entry, inputs)
        compiled = self._compiled.get((entry, bucket))
        with blaming_the_graph(entry):
            if compiled is None:
                return self._named(entry, self._compile(entry, bucket, inputs, arguments))
            return self._named(entry, compiled(*arguments))

    def _bucket(self, entry: str, inputs: Mapping[str, Tensor]) -> Bucket:
        ones = {
            str(letter)
            for name, shape in self._shapes[entry].items()
            for letter, extent in zip(shape, inputs[name].shape, strict=True)
            if extent == 1 and letter in _VARYING
        }
        return tuple(sorted(ones))

    def _compile(
        self,
        entry: str,
        bucket: Bucket,
        inputs: Mapping[str, Tensor],
        arguments: list[Tensor | None],
    ) -> Any:
        """Compiles an entry for a bucket; returns the result of its first run."""
        self._progress(
            f"compiling {entry} for {'one row' if 'B' in bucket else 'several rows'} of "
            f"{'one token' if 'T' in bucket else 'several tokens'} with inductor; this is done "
            f"once, the code is kept in {self._folder}"
        )
        for name, shape in self._shapes[entry].items():
            for dim, letter in enumerate(shape):
                if letter in _VARYING and letter not in bucket:
                    torch._dynamo.mark_dynamic(inputs[name], dim)
        # Not the module itself: a GraphModule's __call__ reports errors in code that dynamo can't
        # compile.
        compiled = torch.compile(
            self._graph(entry).forward, fullgraph=True, options={"fx_graph_cache": True}
        )
        try:
            with keeps_code_in(self._folder):
                result = compiled(*arguments)
        except TorchDynamoException as error:
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise BackendError(
                f"inductor can't compile {entry} here ({reason:.300}); it needs a C++ compiler "
                "(g++ or clang++; on a GPU, Triton). Use backend eager"
            ) from error
        self._compiled[entry, bucket] = compiled
        return result

    def _graph(self, entry: str) -> fx.GraphModule:
        """A copy of the graph for one bucket: torch.compile caches its results by code object."""
        return with_linears(self._entries[entry].module)


def _dense(value: Tensor) -> Tensor:
    """`value` as a contiguous tensor whose strides follow from its shape, also for extents of 1:
    inductor's code is compiled for given strides.
    """
    stride, expected = 1, []
    for extent in reversed(value.shape):
        expected.append(stride)
        stride *= extent
    if value.stride() == tuple(reversed(expected)):
        return value
    return value.contiguous().flatten().view(value.shape)
