"""What backend `cudagraph` records, on the CPU: the periods by the entries, from fixed storage to
fixed storage, with nothing asked of the device in between.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sirius_compile import CompileConfig, compile_model
from sirius_compile.product import Compiled
from sirius_runtime import load
from sirius_runtime.backends.cuda_graph import (
    IDLE,
    LEAST_SLOTS,
    RECORDINGS,
    GraphReplay,
    Recordings,
)
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.by_entries import ByEntries, chooser
from sirius_runtime.decoder import Way, steps
from sirius_runtime.errors import BackendError
from sirius_runtime.graph import to_document
from sirius_runtime.model import GenerationOutput, SiriusModel
from sirius_runtime.operators import OPERATORS
from sirius_runtime.plan import Plan
from sirius_runtime.recorded import Recorded, Replay, Storage, run_at_once
from sirius_runtime.rules import RULES
from sirius_runtime.sampling import Sampling
from sirius_runtime.stats import PhaseClock
from sirius_runtime.tensor_state import ROWS_OF, TensorState
from tests.support.counts import counted_alike
from tests.support.fast import slow_but
from tests.support.models import (
    METHODS,
    Rows,
    random_decoder,
    word_tokenizer,
    write_calibration,
)

RAGGED = [[7, 8, 9], [50, 30, 11, 22, 60], [4 * i + 7 for i in range(15)]]
NEW = 24
MODES: list[dict[str, Any]] = [{"mode": "sirius"}, {"mode": "exact"}, {"mode": "sample", "seed": 3}]

Compile = Callable[[str, str], Compiled]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles each method of a family once."""
    text = write_calibration(tmp_path_factory.mktemp("calibration") / "words.txt")
    made: dict[tuple[str, str], Compiled] = {}

    def make(method: str, family: str = "llama") -> Compiled:
        if (method, family) not in made:
            options = CompileConfig(sparsity=method, period=5, calibration=text, graphs="entries")
            made[method, family] = compile_model(
                random_decoder(family), options, tokenizer=word_tokenizer()
            )
        return made[method, family]

    return make


def run_twice(key: Hashable, work: Callable[[], None], state: Sequence[Tensor]) -> None:
    """As a recording begins: work, its effects on the state taken back, and work that counts."""
    before = [tensor.clone() for tensor in state]
    work()
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    work()


def static(model: SiriusModel, replay: Replay = run_at_once) -> tuple[SiriusModel, Recordings]:
    """The same entries behind recordings."""
    backend = model.backend
    assert isinstance(backend, EagerBackend)
    own = EagerBackend.__new__(EagerBackend)
    own.__dict__ |= backend.__dict__
    recordings = Recordings(own, lambda: replay)
    own.open = recordings.open  # type: ignore[method-assign]
    return SiriusModel(own, model.tokenizer), recordings


def agree(
    eager: SiriusModel, found: SiriusModel, prompts: Rows, **options: Any
) -> GenerationOutput:
    options = {"max_new_tokens": NEW, "eos_token_id": []} | options
    wanted, output = eager.generate(prompts, **options), found.generate(prompts, **options)
    assert output.tokens == wanted.tokens
    assert output.finish_reasons == wanted.finish_reasons
    names = "tokens periods advances aal corrections density effective_density acceptance_rate"
    for name in counted_alike(names, options["eos_token_id"]):
        assert getattr(output.stats, name) == getattr(wanted.stats, name), name
    return output


MATRIX = slow_but(product(METHODS, (1, 4)), (), {("griffin+teal", 4)})


@pytest.mark.parametrize(("method", "width"), MATRIX)
def test_periods_are_those_by_the_entries(compiled: Compile, method: str, width: int) -> None:
    eager = compiled(method, "llama").to_runtime()
    found, _ = static(eager, run_twice)
    refreshes = (0, 2) if "griffin" in method else (0,)
    for options in MODES:
        for confidence in (0.0, 0.5):
            for refresh in refreshes:
                agree(
                    eager,
                    found,
                    RAGGED,
                    tree_width=width,
                    confidence=confidence,
                    refresh=refresh,
                    **options,
                )
    agree(eager, found, RAGGED[:1], tree_width=width, period=1)


def test_rows_that_end_and_steps(compiled: Compile) -> None:
    eager = compiled("topk", "llama").to_runtime()
    found, _ = static(eager, run_twice)
    endless = agree(eager, found, RAGGED, mode="exact").tokens
    ends = [endless[0][2], endless[1][11]]
    output = agree(eager, found, RAGGED, mode="exact", eos_token_id=ends)
    assert len(set(map(len, output.tokens))) == 3
    for mode in ("full", "sparse"):
        agree(eager, found, RAGGED, mode=mode)
        drawn = [
            agree(eager, found, RAGGED, mode=mode, temperature=0.9, seed=seed).tokens
            for seed in (1, 2)
        ]
        assert drawn[0] != drawn[1]


@pytest.mark.gate
def test_a_state_serves_the_next_generation_in_the_same_storage(compiled: Compile) -> None:
    eager = compiled("griffin", "llama").to_runtime()
    kept: list[dict[str, int]] = []
    keys: set[Hashable] = set()

    def look(key: Hashable, work: Callable[[], None], state: Sequence[Tensor]) -> None:
        keys.add(key)
        addresses = addresses_of(storage_of(work))
        work()
        assert addresses_of(storage_of(work)) == addresses
        kept.append(addresses)

    found, recordings = static(eager, look)
    for prompts in (RAGGED[:1], RAGGED[1:2], RAGGED[2:]):  # of three lengths
        for options in MODES[:2]:
            agree(eager, found, prompts, refresh=2, **options)
    assert len(kept) > 20
    assert all(addresses == kept[0] for addresses in kept)
    assert len(keys) == 4  # two rules; neurons kept, and chosen anew
    assert len(recordings._idle) == 1
    for rows in (1, 2, 3):
        agree(eager, found, RAGGED[:rows])
    assert len(recordings._idle) == IDLE


def storage_of(work: Callable[[], None]) -> Storage:
    """The storage whose work it is."""
    cells = [cell.cell_contents for cell in work.__closure__ or ()]
    return next(cell for cell in cells if isinstance(cell, Storage))


def addresses_of(storage: Storage) -> dict[str, int]:
    """Where all that a period reads and writes lies."""
    state = storage.state
    names = (*ROWS_OF, "kept", "kept_tokens")
    tensors = {**storage.own, **{name: getattr(state, name) for name in names}}
    # What is read is there once it ran.
    return {n: tensor.data_ptr() for n, tensor in tensors.items() if not n.startswith("packed")}


class OnDevice(TorchDispatchMode):
    """Raises where work on the device would wait for the host, or the host for it.

    The device is `meta`, whose tensors hold no values: what would need one, for a branch or for a
    shape, raises by itself. Numbers in tensors on the host may take part, as arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.calls += 1
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        numbers = [t for t in tensors if t.device.type != "meta"]
        assert all(t.ndim == 0 for t in numbers), f"{func} works on the host"
        name = func._schema.name.split("::")[1]
        mixed = 0 < len(numbers) < len(tensors)
        assert not (mixed and name in ("copy_", "_to_copy")), f"{func} copies"
        return result


class NoLiterals(TorchFunctionMode):
    """Raises for `torch.tensor`, whose value the device would wait for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.tensor, "torch.tensor copies from the host"
        return func(*args, **(kwargs or {}))


class _References(fx.Interpreter):
    """Runs a graph with the operators' references, as a device without kernels does."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", None) == "sirius":
            target = OPERATORS[target._opname].reference
        return super().call_function(target, args, kwargs)


class _MetaBackend(EagerBackend):
    @torch.inference_mode()
    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bound = self._entries[entry]
        return self._named(entry, _References(bound.module).run(*bound.arguments(inputs)))


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("griffin+teal", "llama"),
        *(
            pytest.param(method, family, marks=pytest.mark.slow)
            for method, family in [*((m, "llama") for m in METHODS), ("experts", "mixtral")]
        ),
    ],
)
def test_a_period_asks_nothing_of_the_device(compiled: Compile, method: str, family: str) -> None:
    made = compiled(method, family)
    device = torch.device("meta")
    backend = _MetaBackend(
        made.spec,
        {name: to_document(graph) for name, graph in made.program.graphs.items()},
        {spec.name: made.weights(spec) for spec in made.spec.weights},
        dtype=torch.float32,
        device=device,
    )
    refresh = made.spec.sparsity.method.per_prompt
    clock = PhaseClock(torch.device("cpu"))
    most = torch.ones(2, dtype=torch.int64, device=device)
    noise = torch.zeros(2, 2, 4, dtype=torch.float64, device=device)
    with torch.inference_mode():
        state = TensorState(backend, 2, 64)
        state.prefill(RAGGED[:2])
        state.choose_neurons()
        storage = Storage(state, 4, run_at_once)
        drafts = Recorded(Way.DRAFT, ByEntries(all_levels=True), storage)
        choose = chooser(Sampling())
        with NoLiterals(), OnDevice() as watch:
            for rule in RULES:
                for width in (1, 4):
                    drawn = noise if RULES[rule].draws else None
                    sampling = Sampling(0.7, 5, 0.9)
                    plan = Plan(4, width, rule, confidence=0.5, sampling=sampling, noise=drawn)
                    plan = replace(plan, observes=refresh, refreshes=refresh)
                    drafts.period(state, plan, most, clock)
            for way, step in steps(choose).items():
                Recorded(way, step, storage).period(state, Plan(1), most, clock)
    assert watch.calls > 1000


def test_the_watch_sees_reads_copies_and_shapes_that_depend_on_values() -> None:
    value = torch.ones(3, device="meta")
    reads: dict[str, Callable[[], object]] = {
        "item": lambda: value.sum().item(),
        "bool": lambda: bool(value.any()),
        "nonzero": lambda: value.nonzero(),
        "mask": lambda: value[value > 0],
        "to the host": lambda: value.to("cpu"),
        "on the host": lambda: torch.ones(2),
        "from the host": lambda: torch.tensor(1, device="meta"),
        "copy": lambda: value.copy_(torch.tensor(1.0)),
    }
    seen = set()
    for name, read in reads.items():
        try:
            with NoLiterals(), OnDevice():
                read()
        except (AssertionError, RuntimeError, NotImplementedError):
            seen.add(name)
    assert seen == set(reads)


def test_work_is_recorded_once_and_leaves_no_trace_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrapper, with what stands for CUDA here: work within a recording has no effect."""
    state = torch.zeros(3)
    recorded: list[object] = []

    def work() -> None:
        state.add_(1)

    @contextmanager
    def graph(graph: object, pool: object) -> Iterator[None]:
        before = state.clone()
        yield
        state.copy_(before)
        recorded.append(graph)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "graph_pool_handle": object,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=work),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay = GraphReplay()
    for times in (1, 2, 3):
        replay("one", work, [state])
        assert state.tolist() == [times] * 3
    assert len(recorded) == 1
    for key in range(2 * RECORDINGS):
        replay(key, work, [state])
    assert len(replay._graphs) <= RECORDINGS
    assert state.tolist() == [3 + 2 * RECORDINGS] * 3


def test_capacities_are_shared_by_prompts_of_many_lengths(compiled: Compile) -> None:
    model = compiled("topk", "llama").to_runtime()
    found, recordings = static(model)
    gc.disable()  # a state is free as soon as its generation is
    try:
        for prompt in RAGGED:
            for options in ({}, {"mode": "sample", "seed": 1}):
                found.generate([prompt], max_new_tokens=4, eos_token_id=[], **options)
    finally:
        gc.enable()
    ((key, storage),) = recordings._idle
    assert storage.state.k_cache.shape[3] == LEAST_SLOTS
    assert key == (1, LEAST_SLOTS, 5, 0)


def test_it_is_refused_without_a_cuda_gpu(compiled: Compile, tmp_path: Path) -> None:
    path = compiled("topk", "llama").save(tmp_path / "model.sirius")
    with pytest.raises(BackendError, match="device is cpu: use backend eager or inductor, or name"):
        load(path, device="cpu", backend="cudagraph")
