"""The eager back end over weights in two tiers (see `sirius_runtime.tiers`): a part is held in fast
memory, and the rest is streamed from a slow tier in each pass.

    Before                          After
    embedding(weight, ids)          rows, places = gather(ids); embedding(rows, places)
    linear(x, weight)               wait(step); linear(x, weight); done(step)

All weight arguments of the graphs are views of one arena: first the held blocks, then the ring
buffer that streamed blocks are read into. A streamed block always has the same place in the ring,
so the views are made once. The planes of a nested weight are the two rows of one view, whose stride
is their distance. Calls whose weights are held are not rewritten.

Where a prompt chooses neurons (griffin), the sparse graph is bound twice. `SPARSE` streams whole
blocks; `CHOSEN` reads copies of the rows that the prompt chose, which lie behind the held blocks. A
sparse step runs the latter if all its rows have the same choice. If that is not the one whose rows
are there, a pass over these blocks copies its rows first.
"""

from __future__ import annotations

import copy
import gc
import operator
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from mmap import mmap
from typing import NamedTuple

import torch
from torch import Tensor, fx

from sirius_runtime.artifact import Artifact, Slot
from sirius_runtime.artifact_zip import want_large_pages
from sirius_runtime.backends.eager import EagerBackend, Entry, blaming_the_graph
from sirius_runtime.backends.rewrite import with_kernels
from sirius_runtime.decoder import Decoder
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.entries import FULL, PERIOD, SPARSE
from sirius_runtime.errors import GenerationError
from sirius_runtime.graph import write_code
from sirius_runtime.kernels.mlp import keeping
from sirius_runtime.ops.chosen import copy_rows, spreading
from sirius_runtime.request import Request
from sirius_runtime.sizes import cache_slots
from sirius_runtime.spec import JSON, ProgramSpec
from sirius_runtime.stats import PhaseClock
from sirius_runtime.tiers.budget import DEFAULT_CONTEXT, cache_bytes, caches, reserve, resident
from sirius_runtime.tiers.chosen import CHOOSING, Rows, rooms, rows_of
from sirius_runtime.tiers.direct_file import DirectFile
from sirius_runtime.tiers.host_memory import HostMemory
from sirius_runtime.tiers.placement import (
    CHOSEN,
    MOVING,
    PAGE,
    Block,
    Needs,
    Placement,
    place,
)
from sirius_runtime.tiers.reads import Reads, Weights, reads_of
from sirius_runtime.tiers.stream import Load, Pending, Stream, Tier, scheduled

_MEASURED = 32 * 2**20
"""Least bytes read at load from which the slow tier's speed is measured."""

_SPEED = 1e9
"""Speed of the slow tier that is assumed where fewer were read, in bytes per second."""


class TieredBackend(EagerBackend):
    """Runs the graphs node by node, over held and streamed weights.

    Call `placed` to choose the held weights, then `settle` to read them, before the first run.
    """

    repeats = False  # each run waits for the stream

    def __init__(
        self,
        program: ProgramSpec,
        documents: Mapping[str, JSON],
        weights: Mapping[str, Tensor],
        slots: Mapping[str, Slot],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """As `EagerBackend`. weights: views of a mapping of the file; they are not read. slots:
        where each weight lies in the file. dtype: the stored one.
        """
        super().__init__(program, documents, weights, dtype=dtype, device=device)
        self._table = Weights(program, self.weights, slots)
        self._reads: dict[str, Reads] = {}
        self._rows: list[Rows] = []
        self._moves: list[list[_Move]] = []  # for each step of the pass that moves rows in
        self._choice: Tensor | None = None  # the neurons [layers, K] whose rows are there
        self._choosing = threading.Lock()
        self.stream: Stream | None = None
        self.cache_room: int | None = None  # bytes of K/V that a budget leaves
        for name, entry in self._entries.items():
            on_cpu = device.type == "cpu"
            entry.runs = with_kernels(entry.module) if on_cpu else copy.deepcopy(entry.module)
            self._reads[name] = reads_of(entry.runs.graph, entry.bound, self._table)
        if program.sparsity.kept_neurons:
            self._entries[CHOSEN] = entry = copy.copy(self._entries[SPARSE])
            entry.runs, entry.bound = copy.deepcopy(entry.runs), entry.bound.copy()
            assert entry.runs is not None
            graph, kept = entry.runs.graph, program.sparsity.kept_neurons
            self._outputs[CHOSEN] = self._outputs[SPARSE]
            self._reads[CHOSEN] = reads_of(graph, entry.bound, self._table)
            self._rows = rows_of(graph, entry.bound, self._table, kept)
        self.needs = _needs(program, self._reads, self._rows, gathers=device.type == "cpu")

    def _own(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(weights)

    def placed(
        self, budget: int, context: int | None = None, rows: int = 1
    ) -> tuple[Placement, int]:
        """The placement for a process of `budget` bytes, and the bytes that the process needs
        besides weights.
        """
        program, itemsize = self.program, self.itemsize
        if rows > 1:  # each has its own choice
            self.needs = replace(self.needs, chosen={})
        context = context or min(program.model.max_seq_len, DEFAULT_CONTEXT)
        gc.collect()
        beside = reserve(program, itemsize, context, rows)
        beside += resident() if self.device.type == "cpu" else 0
        self.cache_room = caches(program, itemsize, context, rows)
        name = "the memory budget of"
        return place(self.needs, budget - beside, name=name, extra=beside), beside

    def settle(self, placement: Placement, arena: Tensor, tier: Tier) -> None:
        """Reads the held blocks to `arena` and binds the graphs' arguments to it.

        arena: uint8 [placement.memory]. tier: copies bytes from offsets of the file to offsets of
        the arena.
        """
        at, places, begin = 0, {}, time.perf_counter()
        pending: list[Pending] = []
        for block in sorted(placement.held, key=lambda block: (block.plane, block.start)):
            places[block] = at + block.start - block.first
            pending.append(tier.fetch(Load(block.first, block.room, block.end - block.first, at)))
            at += block.room
        for fetch in pending:
            fetch.wait()
        speed = at / (time.perf_counter() - begin) if at >= _MEASURED else _SPEED
        self.stream_seconds = placement.bytes_of(FULL) / speed
        copies = {}
        for block, size in placement.chosen.items():
            copies[block] = at
            at += size
        schedules = {
            name: scheduled(steps, at, placement.ring) for name, steps in placement.steps.items()
        }
        self.placement, self.stream = placement, Stream(tier, schedules)
        own = {
            name: {
                block: load.place + block.start - block.first
                for step, moved in zip(placement.steps[name], schedule, strict=True)
                for block, load in zip(step, moved, strict=True)
            }
            for name, schedule in schedules.items()
        }
        if placement.chosen:
            self._moves = self._moves_of(own[MOVING], copies, arena)
        for name, entry in self._entries.items():
            if name == CHOSEN:
                self._read_copies(entry)
            self._bind(name, entry, {**places, **own[name]}, arena, tier)
        self.weights, self._reads, self._rows = {}, {}, []

    @torch.inference_mode()
    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if entry != SPARSE or not self._moves:
            return self._run(entry, inputs)
        with self._choosing:
            return self._run(CHOSEN if self._move_in(inputs["neurons"]) else SPARSE, inputs)

    def _run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self.stream is not None
        with self.stream.running(entry):
            return super().run(entry, inputs)

    def _move_in(self, neurons: Tensor) -> bool:
        """Copies the weights' rows of these neurons [layers, B, K], unless they are there. False if
        the rows of the batch have different neurons.
        """
        choice = neurons[:, 0]
        if neurons.shape[1] > 1 and not torch.equal(neurons, choice[:, None].expand_as(neurons)):
            return False
        if self._choice is None or not torch.equal(self._choice, choice):
            assert self.stream is not None
            self._choice = None
            with self.stream.running(MOVING), blaming_the_graph(SPARSE):
                for step, moves in enumerate(self._moves):
                    self.stream.wait(step)
                    for move in moves:
                        copy_rows(move.weight, choice[move.layer], move.copy)
                    self.stream.done(step)
            self._choice = choice.clone()
        return True

    def open(self, request: Request, rows: int, tokens: int, clock: PhaseClock) -> Decoder:
        slots = rows * cache_slots(tokens, request.period, max(request.widths))
        caches = cache_bytes(self.program, self.itemsize, slots)
        if self.cache_room is not None and caches > self.cache_room:
            raise GenerationError(
                f"{rows} rows of {tokens} tokens take {caches:,} bytes of KV cache, and the memory "
                f"budget leaves {self.cache_room:,} for it: ask for fewer tokens or rows, or load "
                "with a larger context (--context) or memory budget"
            )
        return super().open(request, rows, tokens, clock)

    def _moves_of(
        self, places: Mapping[Block, int], copies: Mapping[Block, int], arena: Tensor
    ) -> list[list[_Move]]:
        """The copies of rows, for each step of the pass that moves them in. places, copies: where
        it reads blocks, and where the copies of their rows begin, in the arena.
        """
        moves: dict[Block, list[_Move]] = {block: [] for block in copies}
        for rows in self._rows:
            if (own := moves.get(rows.block)) is not None:
                begin = copies[rows.block] + sum(move.copy.nbytes for move in own)
                copy = arena[begin : begin + rows.size].view(rows.weight.dtype).view(rows.shape)
                weight = self._placed(rows.weight, places, arena)
                own.append(_Move(weight, copy, rows.layer, rows.argument))
        return [
            [m for block in step for m in moves[block]] for step in self.placement.steps[MOVING]
        ]

    def _read_copies(self, entry: Entry) -> None:
        """Binds the copies of rows to the sparse graph."""
        assert entry.runs is not None
        nodes = entry.runs.graph.find_nodes(op="placeholder")
        for move in (move for moves in self._moves for move in moves):
            entry.bound[move.argument] = move.copy
            (call,) = nodes[move.argument].users
            if (row := CHOOSING.get(call.target)) is not None:
                total = self.program.sparsity.neurons
                on_cpu = call.target is row.cpu
                call.target = (
                    keeping(row.name, row.keeps, total)
                    if on_cpu
                    else spreading(row.overload, total)
                )

    def _bind(
        self, name: str, entry: Entry, places: Mapping[Block, int], arena: Tensor, tier: Tier
    ) -> None:
        assert self.stream is not None
        assert entry.runs is not None
        graph, reads, held = entry.runs.graph, self._reads[name], self.placement.held
        copies = {move.argument for moves in self._moves for move in moves if name == CHOSEN}
        if name == CHOSEN:
            held |= self.placement.chosen.keys()
        streamed = (span for span in reads.spans if not held.issuperset(span.step))
        for step, span in enumerate(streamed):
            with graph.inserting_before(span.first):
                graph.call_function(self.stream.wait, (step,))
            with graph.inserting_after(span.last):
                graph.call_function(self.stream.done, (step,))
        for gather in reads.gathers:
            value = entry.bound[gather.argument]
            assert value is not None
            if not held.issuperset(self._table.read_by(value)):
                _read_rows(gather.call, value, self._table, tier)
        nodes = graph.find_nodes(op="placeholder")
        for index, (node, value) in enumerate(zip(nodes, entry.bound, strict=True)):
            if value is not None and value.numel() and index not in copies:
                entry.bound[index] = self._placed(value, places, arena) if node.users else None
        entry.runs.recompile()
        write_code(entry.runs)

    def _placed(self, value: Tensor, places: Mapping[Block, int], arena: Tensor) -> Tensor:
        """A weight, or a slice of one, as a view of the arena."""
        own, (blocks, offset) = self._table.read_by(value), self._table.at(value)
        place = places[own[0]] + offset % (blocks[0].end - blocks[0].start)
        strides = list(value.stride())
        if len(own) == 2:
            strides[0] = places[own[1]] - places[own[0]]
        return arena.view(value.dtype).as_strided(value.shape, strides, place // value.itemsize)


class _Move(NamedTuple):
    """Copies a prompt's rows of a weight of this layer. argument: of the graph that reads them."""

    weight: Tensor
    copy: Tensor
    layer: int
    argument: int


def load_tiered(
    artifact: Artifact,
    *,
    device: torch.device,
    budget: int,
    context: int | None = None,
    rows: int = 1,
    verify: bool = True,
) -> TieredBackend:
    """The back end of an artifact in a process of at most `budget` bytes.

    On the CPU, weights stream from disk to memory, and the budget is for the whole process. On
    another device, they stream from the host's memory to the device's, and the budget is for the
    device's memory. context, rows: as for `load`. verify: hash the weights, in one more pass over
    the file.

    Raises ConfigError where the budget is too small, naming the least that works.
    """
    backend, on_cpu = analyse(artifact, device), device.type == "cpu"
    placement, _ = backend.placed(budget, context, rows)
    if not on_cpu:
        if verify:
            whole = memoryview(artifact.weight_slots()[0])
            artifact.check_weights_by(lambda start, end: [whole[start:end]])
        settle_from_host(backend, artifact, placement)
        return backend
    file = artifact.file
    assert file is not None
    memory = mmap(-1, max(placement.memory, PAGE))
    want_large_pages(memory)
    tier = DirectFile(file, memory)
    if verify:
        artifact.check_weights_by(tier.chunks)
    backend.settle(placement, torch.frombuffer(memory, dtype=torch.uint8), tier)
    return backend


def settle_from_host(backend: TieredBackend, artifact: Artifact, placement: Placement) -> None:
    """Calls `backend.settle` with the host's memory as the slow tier."""
    size = max(placement.memory, PAGE)
    arena = torch.empty(size, dtype=torch.uint8, device=backend.device)
    whole = torch.frombuffer(artifact.weight_slots()[0], dtype=torch.uint8)
    backend.settle(placement, arena, HostMemory(whole, arena))


def analyse(artifact: Artifact, device: torch.device) -> TieredBackend:
    """The back end of an artifact, before any weight is read."""
    program = artifact.program
    return TieredBackend(
        program,
        {
            entry.name: artifact.read_json(f"graphs/{entry.name}.json")
            for entry in program.entries
            if entry.name != PERIOD
        },
        artifact.weights(),
        artifact.weight_slots()[1],
        dtype=dtype_of(program.model.dtype),
        device=device,
    )


def _needs(
    program: ProgramSpec, reads: Mapping[str, Reads], rows: Sequence[Rows], gathers: bool
) -> Needs:
    """The blocks that a pass of each entry reads. A period has one full and K - 1 sparse passes.
    rows: the weights of which a prompt chooses rows. gathers: whether single rows of an embedding
    can be read from the slow tier; if not, embeddings are held.
    """
    pinned = {block for one in reads.values() for block in one.pinned}
    for one in reads.values():
        counts = Counter(block for span in one.spans for block in span.step)
        # An argument has only one place in the ring, so a block that is read twice must be held.
        pinned.update(block for block, count in counts.items() if count > 1)
    passes = {**dict.fromkeys(reads, 0.0), FULL: 1.0}
    passes[CHOSEN if CHOSEN in reads else SPARSE] = program.period.period - 1.0
    embeddings = {b for one in reads.values() for gather in one.gathers for b in gather.blocks}
    if not gathers:
        pinned |= embeddings
    chosen = {block: room for block, room in rooms(rows).items() if block not in pinned}

    steps = {
        name: tuple(
            step for span in one.spans if (step := tuple(b for b in span.step if b not in pinned))
        )
        for name, one in reads.items()
    }
    if chosen:
        in_file = sorted(chosen, key=lambda block: block.start)
        steps[MOVING], passes[MOVING] = tuple((block,) for block in in_file), 0.0
    return Needs(steps, frozenset(pinned), passes, frozenset(embeddings - pinned), chosen)


def _read_rows(call: fx.Node, value: Tensor, table: Weights, tier: Tier) -> None:
    """Rewrites an embedding so that it reads only the rows that it gathers, from the slow tier."""
    own, (blocks, offset) = table.read_by(value), table.at(value)
    planes = [block.start + offset % (blocks[0].end - blocks[0].start) for block in own]
    count, stride = value.shape[-2], value.stride(-2) * value.itemsize
    shape, dtype, nested = value.shape, value.dtype, value.ndim == 3

    def gather(ids: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct rows, and the index of each id's row among them."""
        unique, places = ids.unique(return_inverse=True)
        rows = unique.tolist()
        if rows and not 0 <= rows[0] <= rows[-1] < count:
            raise IndexError(f"row {rows[-1]} of an embedding of {count}")
        content = bytearray(len(planes) * len(rows) * stride)
        for plane, start in enumerate(planes):
            size = len(rows) * stride
            tier.rows(start, stride, rows, memoryview(content)[plane * size : (plane + 1) * size])
        found = torch.frombuffer(content, dtype=torch.uint8).view(len(planes), -1, stride)
        return (found if nested else found[0].view(dtype))[..., : shape[-1]], places

    with call.graph.inserting_before(call):
        both = call.graph.call_function(gather, (call.args[1],))
        parts = [call.graph.call_function(operator.getitem, (both, i)) for i in (0, 1)]
    call.args = (*parts, *call.args[2:])
