"""Tapes: what a run of a graph computed, to be computed again without Python in between.

At one token a step makes some hundreds of calls, each of which checks its operands, allocates its
result and hands addresses over, in all a fifth of the step. A run with the same shapes over the same
KV cache makes the same calls on the same addresses. So one such run is recorded: the calls of our
kernels with their arguments, and torch's operators, but for views and allocations. Its tensors are
kept, and a replay overwrites them.

Recorded are runs of few tokens on the CPU (`MOST_TOKENS`), once a run with the same key has been
seen. A run in which Python read a number from a tensor is never recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sirius_runtime.kernels.arguments import check
from sirius_runtime.kernels.native import kernels, listening

MOST_TOKENS = 4
"""Of all rows together. With more, what Python takes is little beside the products, and a tape
holds all activations of all layers."""
MOST_TAPES = 16
"""Of one KV cache; another one drops them all."""

_BOUND = frozenset({"k_cache", "v_cache", "neurons"})
"""Inputs that a tape reads where they are; it copies the others."""

_ALLOCATES = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""Runs a graph on its named inputs."""


class Tape:
    """The calls of one run."""

    def __init__(self, run: Run, inputs: Mapping[str, Tensor]) -> None:
        """Runs it: `outputs` are the results."""
        self.repeats = True
        """Whether a replay computes what a run would."""
        self._calls: list[Callable[[], int | None]] = []
        self._held: list[Tensor] = []  # kernels are given addresses alone
        self._inputs = {
            name: value.detach() if name in _BOUND else value.clone()
            for name, value in inputs.items()
        }
        with listening(self._hear), _Recorder(self._note):
            self._own = run(self._inputs)

    @property
    def outputs(self) -> list[Tensor]:
        """Copies of what the run, or the last replay, gave."""
        return [output.clone() for output in self._own]

    def replay(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs of a run on these inputs."""
        for name, own in self._inputs.items():
            if name not in _BOUND:
                own.copy_(inputs[name])
        for call in self._calls:
            if status := call():
                _raise(call, status)
        return self.outputs

    def _hear(self, function: Callable[..., int], arguments: tuple[Any, ...]) -> None:
        self._calls.append(functools.partial(function, *arguments))

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operator of torch has run."""
        if torch.Tag.data_dependent_output in func.tags:
            self.repeats = False
        results = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        self._held += results
        if func.overloadpacket.__name__ in _ALLOCATES:
            return
        if func._schema.is_mutable:
            self._calls.append(functools.partial(_run, func, args, kwargs))
            return
        given = {_storage(value) for value in tree_leaves((args, kwargs)) if _is_tensor(value)}
        if any(_storage(value) not in given for value in results):  # it is no view
            self._calls.append(functools.partial(_overwrite, results, func, args, kwargs))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _run(func: Any, args: Any, kwargs: Any) -> None:
    func(*args, **kwargs)


def _overwrite(results: Sequence[Tensor], func: Any, args: Any, kwargs: Any) -> None:
    """Computes again what the first run computed, to the same place."""
    again = (value for value in tree_leaves(func(*args, **kwargs)) if _is_tensor(value))
    for own, value in zip(results, again, strict=True):
        own.copy_(value)


def _raise(call: Any, status: int) -> None:
    library = kernels()
    assert library is not None
    check(library, status, call.func.__name__.removeprefix("sirius_"))


class _Recorder(TorchDispatchMode):
    """Tells `note` of each operator of torch that has run."""

    def __init__(self, note: Callable[[Any, Any, Any, Any], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result


class Tapes:
    """The tapes of a back end: of each KV cache as long as it lives."""

    def __init__(self) -> None:
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def run(self, entry: str, run: Run, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """What `run` gives for the inputs, by a tape where there is one for them."""
        library, cache, ids = kernels(), inputs.get("k_cache"), inputs.get("input_ids")
        if library is None or cache is None or ids is None or ids.numel() > MOST_TOKENS:
            return run(inputs)
        tapes: dict[Any, Tape | None] = self._of.setdefault(cache, {})
        key = (entry, id(library), torch.get_num_threads(), *_key(inputs))
        if key not in tapes:
            if len(tapes) >= MOST_TAPES:
                tapes.clear()
            tapes[key] = None
            return run(inputs)
        tape = tapes[key]
        if tape is None:
            tape = Tape(run, inputs)
            if tape.repeats:
                tapes[key] = tape
            return tape.outputs
        return tape.replay(inputs)


def _key(inputs: Mapping[str, Tensor]) -> Sequence[Any]:
    """What a tape depends on, of its inputs."""
    return [
        (name, value.dtype, value.shape, (value.data_ptr(), value.stride()))
        if name in _BOUND
        else (name, value.dtype, value.shape)
        for name, value in inputs.items()
    ]
