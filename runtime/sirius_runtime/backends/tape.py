"""Tapes: recordings of a graph's run on the CPU, replayed with little Python in between.

A step of one token makes some hundreds of calls. Each checks its operands, allocates its result and
passes addresses, which takes a fifth of the step's time. A run with the same shapes and the same KV
cache makes the same calls. So one such run is recorded: the calls of our kernels with their
arguments, and torch's operators except views and allocations. The tensors of that run are kept, and
a replay overwrites them.

Only runs of at most `MOST_TOKENS` tokens are recorded, when they occur for the second time. If an
operator of torch gives Python a number, or a result whose shape depends on values, another run may
make other calls: such runs are not replayed. Some reads, such as `Tensor.tolist`, do not pass
through torch's dispatcher. The table of operators says which operators do that (`Operator.reads`,
mixtures); graphs that call them are not recorded.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sirius_runtime.decoder import Backend
from sirius_runtime.kernels.arguments import check
from sirius_runtime.kernels.native import kernels, listening
from sirius_runtime.tensor_state import TensorState, empty_caches

MOST_TOKENS = 4
"""The most tokens of a run, of all rows together. With more, Python's share of the time is small,
and a tape holds all activations of all layers.
"""
MOST_TAPES = 32
"""The most tapes of one KV cache (periods of different lengths need different ones). A further tape
drops all others.
"""

_BOUND = frozenset({"k_cache", "v_cache", "neurons"})
"""Inputs that a tape reads in place; it copies the others."""

_ALLOCATES = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})

_DEPENDS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""Runs a graph on its named inputs."""


class Tape:
    """The recorded calls of one run."""

    def __init__(self, run: Run, inputs: Mapping[str, Tensor]) -> None:
        """Runs the graph and records the run, whose results are `outputs`."""
        self.repeats = True
        """Whether a replay gives the results of a run."""
        self._calls: list[Callable[[], int | None]] = []
        self._held: list[Tensor] = []  # kept alive, because kernels get only addresses
        self._inputs = {
            name: value.detach() if name in _BOUND else value.clone()
            for name, value in inputs.items()
        }
        with listening(self._hear), _Operators(self._note):
            self._own = run(self._inputs)

    @property
    def outputs(self) -> list[Tensor]:
        """Copies of the outputs of the run or of the last replay."""
        return [output.clone() for output in self._own]

    def replay(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Replays the calls on these inputs; returns their outputs."""
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
        """Records an operator of torch that has run."""
        if not _DEPENDS.isdisjoint(func.tags):
            self.repeats = False
        results = _tensors(result)
        self._held += results
        if func.overloadpacket.__name__ in _ALLOCATES:
            return
        if func._schema.is_mutable:
            self._calls.append(functools.partial(_run, func, args, kwargs))
            return
        given = {_storage(value) for value in _tensors((args, kwargs))}
        if any(_storage(value) not in given for value in results):  # not a view
            self._calls.append(functools.partial(_overwrite, results, func, args, kwargs))


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _run(func: Any, args: Any, kwargs: Any) -> None:
    func(*args, **kwargs)


def _overwrite(results: Sequence[Tensor], func: Any, args: Any, kwargs: Any) -> None:
    """Runs an operator again and writes its results to the tensors of the first run."""
    for own, value in zip(results, _tensors(func(*args, **kwargs)), strict=True):
        own.copy_(value)


def _raise(call: Any, status: int) -> None:
    library = kernels()
    assert library is not None
    check(library, status, call.func.__name__.removeprefix("sirius_"))


class _Operators(TorchDispatchMode):
    """Calls `note` after each operator of torch."""

    def __init__(self, note: Callable[[Any, Any, Any, Any], None]) -> None:
        super().__init__()
        self._note = note

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether TorchDispatchMode wraps the method below for torch.compile, which would import
        it: that takes a second.
        """
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result


class Spare:
    """The K/V caches of the last answer of one row. The next answer uses them again, and with them
    their tapes.
    """

    STEP = 512
    """Caches have a multiple of so many slots, so that they fit answers of other lengths, too."""
    LARGEST = 1 << 28
    """Caches of more bytes are not kept."""

    def __init__(self) -> None:
        self._free: list[tuple[Tensor, Tensor]] = []

    def state(self, backend: Backend, slots: int) -> TensorState:
        """A state of one row with room for so many slots or more."""
        slots = -(-slots // self.STEP) * self.STEP
        caches = self._take(slots) or empty_caches(backend, 1, slots)
        state = TensorState(backend, 1, slots, caches)
        weakref.finalize(state, self._give, caches).atexit = False
        return state

    def _take(self, slots: int) -> tuple[Tensor, Tensor] | None:
        try:
            caches = self._free.pop()
        except IndexError:
            return None
        if caches[0].shape[3] != slots:
            return None
        for cache in caches:
            cache.zero_()  # no value of another answer is ever read, not even multiplied by zero
        return caches

    def _give(self, caches: tuple[Tensor, Tensor]) -> None:
        if sum(cache.nbytes for cache in caches) <= self.LARGEST:
            self._free[:] = [caches]


class Tapes:
    """The tapes of a back end; those of a KV cache are dropped with it."""

    def __init__(self) -> None:
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def run(self, entry: str, run: Run, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The outputs of `run` for the inputs; replays a tape if there is one for them."""
        library, cache, ids = kernels(), inputs.get("k_cache"), inputs.get("input_ids")
        if library is None or cache is None or ids is None or ids.numel() > MOST_TOKENS:
            return run(inputs)
        tapes: dict[Any, Tape | bool] = self._of.setdefault(cache, {})
        key = (entry, id(library), torch.get_num_threads(), *_key(inputs))
        tape = tapes.get(key)
        if isinstance(tape, Tape):
            return tape.replay(inputs)
        if tape is None and len(tapes) >= MOST_TAPES:
            tapes.clear()
        if tape is None:
            tapes[key] = True  # the next run is recorded
        if not tape:
            return run(inputs)
        made = Tape(run, inputs)
        tapes[key] = made if made.repeats else False
        return made.outputs


def _key(inputs: Mapping[str, Tensor]) -> Sequence[Any]:
    """The properties of the inputs that a tape depends on."""
    return [
        (name, value.dtype, value.shape, (value.data_ptr(), value.stride()))
        if name in _BOUND
        else (name, value.dtype, value.shape)
        for name, value in inputs.items()
    ]
