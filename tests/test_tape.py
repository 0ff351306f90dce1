"""Tapes: replays of steps are what the steps are, to the bit, and nothing stale is replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sirius_runtime.backends import tape
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.backends.tape import Tape, Tapes
from sirius_runtime.errors import OperandIndexError
from sirius_runtime.kernels.build import InstructionSet
from sirius_runtime.kernels.native import references
from sirius_runtime.tensor_state import TensorState
from tests.support.fast import gate_but, slow_but
from tests.support.kernels import require
from tests.support.models import METHODS, TinyModels
from tests.support.operators import randn, sirius

PROMPT = [[5, 9, 17, 30]]


@pytest.fixture(autouse=True)
def kernels() -> None:
    require(InstructionSet.PORTABLE)


def state_of(backend: EagerBackend, rows: int = 1) -> TensorState:
    state = TensorState(backend, rows, 64)
    with torch.inference_mode():
        state.root = state.prefill(PROMPT * rows)[0].argmax(-1)
        state.choose_neurons()
    return state


@torch.inference_mode()
def answer(state: TensorState, entry: str, steps: int = 9) -> list[Tensor]:
    """The logits of greedy steps."""
    found = []
    for _ in range(steps):
        found.append(state.step(entry)["logits"][:, 0])
        state.commit(1, found[-1].argmax(-1))
    return found


@contextmanager
def counting_replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    found, replay = list[int](), Tape.replay

    def counted(own: Tape, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        found.append(1)
        return replay(own, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Tape, "replay", counted)
        yield found


@pytest.mark.parametrize("entry", ["full", "sparse"])
@pytest.mark.parametrize("method", gate_but(METHODS, {"none", "topk", "griffin", "griffin+teal"}))
def test_steps_by_tape_are_steps(
    tiny: TinyModels, method: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = tiny(method=method).model.backend
    assert isinstance(backend, EagerBackend)
    for rows in (1, 2):
        monkeypatch.setattr(tape, "MOST_TOKENS", 0)
        wanted = answer(state_of(backend, rows), entry)
        monkeypatch.setattr(tape, "MOST_TOKENS", 4)
        with counting_replays(monkeypatch) as replays:
            found = answer(state_of(backend, rows), entry)
        assert len(replays) == len(wanted) - 2  # one to see, one to record
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


def test_two_answers_in_turn_have_tapes_of_their_own(tiny: TinyModels) -> None:
    backend = tiny().model.backend
    assert isinstance(backend, EagerBackend)
    wanted = answer(state_of(backend), "full", 12)
    one, other = state_of(backend), state_of(backend)
    found = []
    for _ in range(12):
        found += answer(one, "full", 1)
        answer(other, "full", 1)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_rows_that_leave_take_their_tapes_with_them(tiny: TinyModels) -> None:
    backend = tiny().model.backend
    assert isinstance(backend, EagerBackend)
    wanted = answer(state_of(backend), "full", 12)
    state = state_of(backend, 2)
    found = [logits[:1] for logits in answer(state, "full", 6)]
    with torch.inference_mode():
        state.select([1])
    found += answer(state, "full", 6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_tapes_go_with_their_cache(tiny: TinyModels) -> None:
    backend = tiny().model.backend
    assert isinstance(backend, EagerBackend)
    gc.collect()
    before = len(backend._tapes._of)
    state = state_of(backend)
    answer(state, "full")
    assert len(backend._tapes._of) == before + 1
    del state
    gc.collect()
    assert len(backend._tapes._of) == before


def test_the_next_answer_has_the_tapes_of_the_last_one(
    tiny: TinyModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny().compiled.to_runtime()  # which has answered nothing yet
    options = {"mode": "full", "max_new_tokens": 8}
    wanted = model.generate(PROMPT, **options).tokens
    with counting_replays(monkeypatch) as replays:
        assert model.generate(PROMPT, **options).tokens == wanted
    assert len(replays) == 7  # the prompt's first token, then steps


def test_caches_that_are_in_use_are_nobody_else_s(tiny: TinyModels) -> None:
    backend = tiny().model.backend
    assert isinstance(backend, EagerBackend)
    with torch.inference_mode():
        one, other = (backend._spare.state(backend, 64) for _ in range(2))
        assert one.k_cache.data_ptr() != other.k_cache.data_ptr()
        place = one.k_cache.data_ptr()
        one.k_cache.fill_(torch.nan)
        del one
        gc.collect()
        again = backend._spare.state(backend, 64)
    assert again.k_cache.data_ptr() == place
    assert not again.k_cache.any()


def test_results_outlive_the_next_replay(tiny: TinyModels) -> None:
    backend = tiny().model.backend
    assert isinstance(backend, EagerBackend)
    state = state_of(backend)
    found = answer(state, "full")
    kept = [logits.clone() for logits in found]
    answer(state, "full")
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def inputs_of(x: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(1, 1), "x": x, "k_cache": torch.zeros(1)}


def runs(function: object, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What each of the inputs gives, of equal shapes."""
    tapes, given = Tapes(), inputs_of(inputs[0])
    return [tapes.run("e", function, given | {"x": x})[0].clone() for x in inputs]  # type: ignore[arg-type]


def test_operators_of_torch_are_replayed_and_views_are_not_copied() -> None:
    weight, total = randn(8, 8, seed=0), torch.zeros(3)

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        x = inputs["x"]
        y = sirius.linear(x.t().contiguous().t(), weight)
        noughts = torch.zeros(3)
        noughts += y[:, 0]
        total.add_(noughts)
        return [torch.cat([y.chunk(2, -1)[1].relu(), noughts[:, None]], -1)]

    inputs = [randn(3, 8, seed=seed) for seed in range(1, 6)]
    found = runs(run, inputs)
    sums = total.clone()
    total.zero_()
    wanted = [run({"x": x})[0] for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(total, sums)  # written in place, once a run


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0, 0].item() > 0,
    "bool": lambda x: (x > 0).all(),
    "int": lambda x: int(x[0, 0]) > 0,
    "float": lambda x: float(x[0, 0]) > 0,
    "shape": lambda x: len((x > 0).nonzero()),
    "equal": lambda x: torch.equal(x, x.abs()),
}


@pytest.mark.parametrize("read", READS)
def test_a_run_that_reads_numbers_is_not_replayed(read: str) -> None:
    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        x = inputs["x"]
        return [x * 2 if READS[read](x) else x * 3]

    inputs = [torch.full((1, 1), value) for value in (1.0, 2.0, 3.0, -1.0, 4.0)]
    assert [float(y) for y in runs(run, inputs)] == [2.0, 4.0, 6.0, -3.0, 8.0]


class Reads(TorchFunctionMode):
    """Counts the calls by which Python reads a tensor's values."""

    FUNCTIONS = frozenset(
        {
            *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__),
            *(Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__),
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.FUNCTIONS
        return func(*args, **(kwargs or {}))


READING = [
    *(("llama", method) for method in ("none", "topk", "griffin", "cats", "teal")),
    *(("qwen3_moe", method) for method in ("none", "topk", "experts")),
]


# Of every method, the full path is the same.
@pytest.mark.parametrize(
    ("entry", "family", "method"),
    slow_but(
        ((entry, *case) for entry in ("full", "sparse") for case in READING),
        [("full", "llama", "topk")] + [("sparse", *case) for case in READING[1:3]],
        [("full", "qwen3_moe", "none")] + [("sparse", *case) for case in READING[3:]],
    ),
)
def test_the_table_says_which_operators_read_values(
    tiny: TinyModels, entry: str, family: str, method: str
) -> None:
    backend = tiny(family, method=method).model.backend
    assert isinstance(backend, EagerBackend)
    state = state_of(backend)
    answer(state, entry, 1)  # what is read once and kept does not matter
    with Reads() as reads, torch.inference_mode():
        backend.run(entry, last_inputs(state, entry))
    assert backend._entries[entry].reads == (reads.count > 0)


def last_inputs(state: TensorState, entry: str) -> dict[str, Tensor]:
    """The inputs of the state's next step."""
    found: list[dict[str, Tensor]] = []
    run = state.backend.run

    def keep(entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found.append(dict(inputs))
        return run(entry, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state.backend, "run", keep)
        with torch.inference_mode():
            state.step(entry)
    return found[0]


def test_references_are_not_replayed() -> None:
    calls = []

    def run(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        calls.append(1)
        return [inputs["x"] * 1]

    with references():
        runs(run, [torch.ones(1)] * 4)
    assert len(calls) == 4


def test_what_a_kernel_refuses_in_a_replay_is_named(tiny: TinyModels) -> None:
    """A slot that is not there: the replayed kernel compares it, as ever."""
    backend = tiny().model.backend
    assert isinstance(backend, EagerBackend)
    state = state_of(backend)
    answer(state, "full", 4)
    state.length = state.length + 1000
    with pytest.raises(OperandIndexError, match="attention"), torch.inference_mode():
        state.step("full")
