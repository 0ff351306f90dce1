"""The CUDA kernels' share of a GPU's copy bandwidth, and torch's, at Llama-3-8B and 70B sizes.

    python -m benchmarks.gpu_kernels
    python -m benchmarks.gpu_kernels --nested     # at Qwen2.5-1.5B's and Llama-3-8B's sizes

Random weights, one row, bf16 by default. GB/s counts the bytes that a call needs to read, once
each: weights, and keys and values in use; not activations. The roof is the copy of a gigabyte,
counted as read and written. After its replays, the results of a graph's first and last call are
compared with the reference's on the same GPU. `error` is a token's relative error; a row is shown
only if rounding explains it (`benchmarks.checked`).

A call takes a few kernels of a few microseconds each, and a host can't launch single kernels that
fast. So each side is a CUDA graph of calls, like a recorded period. The calls take turns over
several sets of weights, about ten times the L2 cache, so that the cache is cold. Graphs of both
sides are replayed in turns; printed are the median and the quartiles over the replays. torch is the
dense computation by `F.linear` and element-wise operators. For attention it is
`scaled_dot_product_attention` over the slots in use, whose number the host passes (the kernels read
it on the device), with a mask if there are several tokens.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sirius_runtime.operators
from benchmarks import checked
from sirius_runtime.command_line import finish
from sirius_runtime.kernels.cuda.available import launchers
from sirius_runtime.nested import nest, unnest
from sirius_runtime.operators import OPERATORS
from sirius_runtime.ops import attention, linear, mlp
from sirius_runtime.spec import Layout

SKIPPED = (0.3, 0.5, 0.65)
POOL, ROTATED, COPIED = 3 << 30, 1 << 29, 1 << 30  # bytes
MOST_CALLS = 32  # of a graph
MOST_NESTED_CALLS = 256  # a small shape's high plane is a megabyte, and an L2 cache has fifty
REPLAYS = 21
REFERENCES = {"linear": linear, "mlp": mlp, "attention": attention}


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    name: str
    hidden: int
    neurons: int
    heads: int
    groups: int
    head: int
    vocabulary: int | None
    contexts: tuple[int, ...] = (2048, 8192)


SHAPES = (
    Shape("8B", 4096, 14336, 32, 8, 128, 128_256),
    Shape("70B", 8192, 28672, 64, 8, 128, None),
)
NESTED_SHAPES = (Shape("1.5B", 1536, 8960, 12, 2, 128, 151_936), SHAPES[0])
PLANES = {"both planes": 2, "high plane": 1}
NESTED_TOKENS = (1, 8)
NIBBLES = 4.25 / 8
"""Bytes of a weight and its share of a scale, in one plane."""


@dataclass(frozen=True)
class Case:
    """A call, by a kernel and by the baseline, over one of several sets of weights."""

    name: str
    module: str
    operator: str
    tokens: int
    sets: list[tuple[Any, ...]]
    """The operator's arguments."""
    torch: Callable[..., object] | None
    """The dense baseline, of the same arguments; None: the operator's kernel, of `plain`."""
    bytes: Callable[[object], float]
    """The bytes that a call needs to read, from its result."""
    plain: list[tuple[Any, ...]] = field(default_factory=list)
    """The arguments with weights that are not nested."""

    def baseline(self, device: torch.device) -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
        if self.torch is None:
            return self.kernel(device), self.plain
        return self.torch, self.sets

    def kernel(self, device: torch.device) -> Callable[..., Any]:
        launching = launchers(self.module, device)
        if launching is None:
            raise RuntimeError("the CUDA kernels are not available here: see the warning above")
        return served(OPERATORS[self.operator].kernel(launching))

    def reference(self) -> Callable[..., Any]:
        return getattr(REFERENCES[self.module], self.operator)


def served(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, made to raise RuntimeError instead of leaving a call to the reference."""

    def call(*args: object) -> Any:
        done = kernel(*args)
        if done is None:
            raise RuntimeError(f"{kernel.__name__} does not support these arguments")
        return done

    return call


@dataclass(frozen=True)
class Row:
    """A line of the table: a case's times in microseconds, median and quartiles."""

    shape: str
    case: str
    tokens: int
    megabytes: float
    microseconds: float
    quartiles: tuple[float, float]
    gigabytes_per_second: float
    of_copy: float
    baseline_microseconds: float
    baseline_quartiles: tuple[float, float]
    error: float

    def cells(self) -> list[str]:
        return [
            *(self.shape, self.case, str(self.tokens), f"{self.megabytes:.1f}"),
            f"{self.microseconds:.1f} ({self.quartiles[0]:.1f}-{self.quartiles[1]:.1f})",
            *(f"{self.gigabytes_per_second:.0f}", f"{self.of_copy:.0%}"),
            f"{self.baseline_microseconds:.1f} "
            f"({self.baseline_quartiles[0]:.1f}-{self.baseline_quartiles[1]:.1f})",
            f"{self.baseline_microseconds / self.microseconds:.2f}",
            f"{self.error:.1e}",
        ]


def header(baseline: str) -> list[str]:
    """Of the table; `baseline`: what the other side is."""
    own = ["shape", "call", "tokens", "MB", "µs (quartiles)", "GB/s", "of copy"]
    return [*own, f"{baseline} µs (quartiles)", f"{baseline} / ours", "error"]


class Pool:
    """Weights of any shape, cut from one large buffer, never the same ones twice in a row."""

    def __init__(self, dtype: torch.dtype, device: torch.device, size: int, rotated: int) -> None:
        self.buffer = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
        self.buffer.normal_(std=0.02)
        self.dtype, self.device, self.rotated, self._at = dtype, device, rotated, 0

    def take(self, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        if self._at + size > self.buffer.numel():
            self._at = 0
        self._at += size
        return self.buffer[self._at - size : self._at].view(shape)

    def sets(self, *shapes: tuple[int, int]) -> list[list[Tensor]]:
        """Sets of weights of these shapes, together several times the L2 cache."""
        size = sum(a * b for a, b in shapes) * self.dtype.itemsize
        count = max(2, min(MOST_CALLS, -(-self.rotated // size)))
        return [[self.take(*shape) for shape in shapes] for _ in range(count)]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)


def torch_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *_: object) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down.t())


def torch_linears(x: Tensor, weights: list[Tensor], _: object) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight) for weight in weights)


def linear_cases(pool: Pool, shape: Shape, tokens: int) -> Iterator[Case]:
    x = pool.random(1, tokens, shape.hidden)
    shapes = {"q, o": (shape.hidden, shape.hidden)}
    if tokens == 1:
        shapes["k, v"] = (shape.groups * shape.head, shape.hidden)
        if shape.vocabulary is not None:
            shapes["lm_head"] = (shape.vocabulary, shape.hidden)
    for name, size in shapes.items():
        sets = [(x, weight, None) for (weight,) in pool.sets(size)]
        read = size[0] * size[1] * x.itemsize
        title = f"linear {name} [{size[0]}, {size[1]}]"
        yield Case(title, "linear", "linear", tokens, sets, F.linear, lambda _, read=read: read)
    rows = shape.hidden, *[shape.groups * shape.head] * 2
    read = sum(rows) * shape.hidden * x.itemsize
    yield Case(
        f"linears q, k, v [{' + '.join(map(str, rows))}, {shape.hidden}]",
        "linear",
        "linears",
        tokens,
        [(x, weights, [None] * 3) for weights in pool.sets(*((n, shape.hidden) for n in rows))],
        torch_linears,
        lambda _, read=read: read,
    )


def mlp_cases(pool: Pool, shape: Shape, tokens: int) -> Iterator[Case]:
    x = pool.random(1, tokens, shape.hidden)
    neurons = shape.neurons
    row = shape.hidden * x.itemsize
    rest = None, None, None, "silu", 0
    sets = [(x, *weights, *rest) for weights in pool.sets(*[(neurons, shape.hidden)] * 3)]
    case = partial(Case, module="mlp", tokens=tokens, torch=torch_mlp)

    def extended(*extra: object) -> list[tuple[Any, ...]]:
        return [(*args, *extra) for args in sets]

    yield case("dense_mlp", operator="dense_mlp", sets=sets, bytes=lambda _: 3 * neurons * row)
    score = F.silu(F.linear(x, sets[0][1])).abs().float().mean((0, 1))
    for skipped in SKIPPED:
        keep = round(neurons * (1 - skipped))
        # As it is stored, so that it is the same number on every path.
        threshold = score.quantile(skipped).to(x.dtype).item()
        chosen = torch.randperm(neurons, device=x.device)[:keep].sort().values.expand(1, 1, keep)
        share = f"{skipped:.0%} skipped"
        yield case(
            f"griffin_mlp, {share}",
            operator="griffin_mlp",
            sets=extended(chosen),
            bytes=lambda _, keep=keep: 3 * keep * row,
        )
        yield case(
            f"cats_mlp, {share}",
            operator="cats_mlp",
            sets=extended(threshold),
            bytes=lambda done: (neurons + 2 * int(done[1].sum())) * row,
        )
        if tokens > 1:
            continue
        yield case(
            f"topk_mlp, {share}",
            operator="topk_mlp",
            sets=extended(keep),
            bytes=lambda _, keep=keep: (neurons + 2 * keep) * row,
        )
        yield case(
            f"griffin_cats_mlp, {share}, then half by its threshold",
            operator="griffin_cats_mlp",
            sets=extended(chosen, score.median().to(x.dtype).item()),
            bytes=lambda done, keep=keep: (keep + 2 * int(done[1].sum())) * row,
        )


def channel_cases(pool: Pool, shape: Shape, tokens: int) -> Iterator[Case]:
    sizes = (
        (shape.hidden, shape.hidden),
        (shape.hidden, shape.neurons),
        (shape.neurons, shape.hidden),
    )
    for inputs, outputs in sizes:
        x = pool.random(1, tokens, inputs)
        score = x.float().abs().mean((0, 1))
        weights = pool.sets((inputs, outputs))
        for skipped in SKIPPED:
            threshold = score.quantile(skipped).item()
            yield Case(
                f"sparse_linear [{inputs}, {outputs}], {skipped:.0%} skipped",
                "linear",
                "sparse_linear",
                tokens,
                [(x, weight, None, threshold) for (weight,) in weights],
                lambda x, weight, *_: F.linear(x, weight.t()),
                lambda done, row=outputs * x.itemsize: int(done[1].sum()) * row,
            )


def attention_cases(pool: Pool, shape: Shape, tokens: int) -> Iterator[Case]:
    groups, head = shape.groups, shape.head
    q = pool.random(1, shape.heads, tokens, head)
    k, v = (pool.random(1, groups, tokens, head) for _ in range(2))
    index = torch.arange(tokens, device=pool.device)
    mask = (index[:, None] - index).clamp(min=-1)[None]
    scale = head**-0.5
    for context in shape.contexts:
        slots = context + 64
        layers = max(2, min(MOST_CALLS, -(-ROTATED // (2 * slots * groups * head * 2))))
        caches = [pool.random(layers, 1, groups, slots, head) for _ in range(2)]
        length = torch.tensor([context], device=pool.device)
        at = length[:, None] + index
        blocks = [pool.random(layers, 1, groups, tokens, head) for _ in range(2)]
        read = 2 * context * groups * head * q.itemsize
        history = torch.ones(1, tokens, context, dtype=torch.bool, device=pool.device)
        visible = None if tokens == 1 else torch.cat([history, mask >= 0], 2)

        def dense(
            *args: Any, context: int = context, layer: int, visible: Tensor | None = visible
        ) -> Tensor:
            keys, values = (cache[args[layer], :, :, : context + tokens] for cache in args[3:5])
            return F.scaled_dot_product_attention(
                args[0], keys, values, attn_mask=visible, scale=scale, enable_gqa=True
            )

        kind = scale, None, None
        yield Case(
            f"cached_attention, {context} tokens in use",
            "attention",
            "cached_attention",
            tokens,
            [(q, k, v, *caches, at, at, length, mask, i, *kind) for i in range(layers)],
            partial(dense, layer=9),
            lambda _, read=read: read,
        )
        yield Case(
            f"block_attention, {context} tokens in use",
            "attention",
            "block_attention",
            tokens,
            [(q, k, v, *caches, *blocks, at, index, length, mask, i, *kind) for i in range(layers)],
            partial(dense, layer=11),
            lambda _, read=read: read,
        )


def cases(pool: Pool, shape: Shape) -> Iterator[Case]:
    """All calls at a decoder's sizes, of one token and of several."""
    for tokens in (1, 8):
        yield from linear_cases(pool, shape, tokens)
        yield from mlp_cases(pool, shape, tokens)
        if tokens == 1:
            yield from channel_cases(pool, shape, tokens)
        yield from attention_cases(pool, shape, tokens)


class NestedPair:
    """Nested weights, and the same numbers in the pool's dtype, in the layout of its kernels."""

    def __init__(self, pool: Pool, outputs: int, inputs: int, layout: Layout) -> None:
        self.planes = nest(pool.take(outputs, inputs), layout)
        plain = unnest(self.planes, pool.dtype)
        self.plain = plain if layout is Layout.BY_OUTPUTS else plain.t().contiguous()
        self.parameters = outputs * inputs


Sizes = tuple[int, int, Layout]


def nested_sets(pool: Pool, *sizes: Sizes) -> list[list[NestedPair]]:
    """Sets of nested weights of these outputs, inputs and layouts; the high planes of all are
    several times the L2 cache.
    """
    size = sum(outputs * inputs for outputs, inputs, _ in sizes) * NIBBLES
    count = max(2, min(MOST_NESTED_CALLS, math.ceil(pool.rotated / size)))
    return [[NestedPair(pool, *own) for own in sizes] for _ in range(count)]


def nested_linear_cases(pool: Pool, shape: Shape) -> Iterator[Case]:
    few = shape.groups * shape.head
    products = {"q, o": (shape.hidden,), "q, k, v": (shape.hidden, few, few)}
    if shape.vocabulary is not None:
        products["lm_head"] = (shape.vocabulary,)
    for name, outputs in products.items():
        sets = nested_sets(pool, *((n, shape.hidden, Layout.BY_OUTPUTS) for n in outputs))
        biases: list[None] = [None] * len(outputs)
        for tokens in (1,) if name == "lm_head" else NESTED_TOKENS:
            x = pool.random(1, tokens, shape.hidden)
            for planes, count in PLANES.items():
                read = sum(outputs) * shape.hidden * NIBBLES * count
                yield Case(
                    f"linears {name} [{' + '.join(map(str, outputs))}, {shape.hidden}], {planes}",
                    "linear",
                    "linears",
                    tokens,
                    [(x, [pair.planes[:count] for pair in own], biases) for own in sets],
                    None,
                    lambda _, read=read: read,
                    [(x, [pair.plain for pair in own], biases) for own in sets],
                )


def nested_mlp_cases(pool: Pool, shape: Shape) -> Iterator[Case]:
    neurons = shape.neurons
    wide = neurons, shape.hidden, Layout.BY_OUTPUTS
    own = nested_sets(pool, wide, wide, (shape.hidden, neurons, Layout.BY_INPUTS))
    rest = None, None, None, "silu", 0
    keep = neurons // 2
    chosen = torch.randperm(neurons, device=pool.device)[:keep].sort().values.expand(1, 1, keep)
    for tokens, (planes, count) in itertools.product(NESTED_TOKENS, PLANES.items()):
        x = pool.random(1, tokens, shape.hidden)
        row = shape.hidden * NIBBLES * count
        score = mlp.neuron_scores(x, *(pair.plain for pair in own[0]), *rest).float()
        half = score.mean((0, 1)).median().to(x.dtype).item()
        calls: list[tuple[str, tuple[Any, ...], Callable[[Any], float]]] = [
            ("dense_mlp", (), lambda _, row=row: 3 * neurons * row),
            ("griffin_mlp", (chosen,), lambda _, row=row: 3 * keep * row),
            ("cats_mlp", (half,), lambda y, row=row: (neurons + 2 * int(y[1].sum())) * row),
        ]
        if tokens == 1:
            calls += [
                ("topk_mlp", (keep,), lambda _, row=row: (neurons + 2 * keep) * row),
                (
                    "griffin_cats_mlp",
                    (chosen, half),
                    lambda y, row=row: (keep + 2 * int(y[1].sum())) * row,
                ),
            ]
        for operator, extra, read in calls:
            title = f"{operator}{', half skipped' if extra else ''}, {planes}"
            nested = [(x, *(pair.planes[:count] for pair in one), *rest, *extra) for one in own]
            plain = [(x, *(pair.plain for pair in one), *rest, *extra) for one in own]
            yield Case(title, "mlp", operator, tokens, nested, None, read, plain)


def nested_channel_cases(pool: Pool, shape: Shape) -> Iterator[Case]:
    sizes = (shape.hidden, shape.neurons), (shape.neurons, shape.hidden)
    for inputs, outputs in sizes:
        x = pool.random(1, 1, inputs)
        threshold = x.float().abs().median().item()
        own = [pair for (pair,) in nested_sets(pool, (outputs, inputs, Layout.BY_INPUTS))]
        for planes, count in PLANES.items():
            yield Case(
                f"sparse_linear [{inputs}, {outputs}], half skipped, {planes}",
                "linear",
                "sparse_linear",
                1,
                [(x, pair.planes[:count], None, threshold) for pair in own],
                None,
                lambda y, row=outputs * NIBBLES * count: int(y[1].sum()) * row,
                [(x, pair.plain, None, threshold) for pair in own],
            )


def nested_cases(pool: Pool, shape: Shape) -> Iterator[Case]:
    """All calls with nested weights at a decoder's sizes."""
    yield from nested_mlp_cases(pool, shape)
    yield from nested_linear_cases(pool, shape)
    yield from nested_channel_cases(pool, shape)


@contextmanager
def float32_sums() -> Iterator[None]:
    """A context in which torch sums products in float32, like the kernels. Used for checks only."""
    matmul = torch.backends.cuda.matmul
    names = "allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


def captured(
    call: Callable[..., Any], sets: list[tuple[Any, ...]]
) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A graph of one call for each set, and the results that it writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled, loaded or allocated once is so by now
        for args in sets[:2]:
            call(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(*args) for args in sets]
    return graph, results


def replayed(graphs: list[torch.cuda.CUDAGraph], replays: int) -> list[list[float]]:
    """Microseconds of each graph's replays, which take turns."""
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
    for turn in range(replays + 2):
        for graph, pairs in zip(graphs, events, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            if turn >= 2:  # the first ones wake the clocks
                pairs.append((begin, end))
    torch.cuda.synchronize()
    return [[begin.elapsed_time(end) * 1e3 for begin, end in pairs] for pairs in events]


def copy_bandwidth(pool: Pool) -> float:
    """Bytes a second, read and written, of a copy within the device."""
    half = min(COPIED // pool.dtype.itemsize, pool.buffer.numel() // 2)
    source, target = pool.buffer[:half], torch.empty_like(pool.buffer[:half])
    graph, _ = captured(lambda: target.copy_(source), [()] * 2)
    times = replayed([graph], REPLAYS)[0]
    return 2 * 2 * half * pool.dtype.itemsize / (statistics.median(times) * 1e-6)


def right(case: Case, shape: Shape, args: tuple[Any, ...], done: object) -> float:
    """The error of a call's result; ends the program where it is more than rounding makes."""
    row = f"{shape.name}, {case.name}, {case.tokens} tokens"
    with float32_sums():
        return checked.call(row, case.reference(), args, done).error


def ends(sets: list[tuple[Any, ...]]) -> list[tuple[int, tuple[Any, ...]]]:
    """The first and the last set of arguments, by index."""
    return [(0, sets[0]), (len(sets) - 1, sets[-1])]


def measured(case: Case, shape: Shape, pool: Pool, copy: float) -> Row:
    """A case timed, and what was timed checked: of the first and the last call of its graph."""
    kernel = case.kernel(pool.device)
    needed = statistics.mean(case.bytes(kernel(*args)) for args in case.sets)
    (graph, results), (baseline, _) = (
        captured(kernel, case.sets),
        captured(*case.baseline(pool.device)),
    )
    replays = replayed([graph, baseline], REPLAYS)
    ours, theirs = ([t / len(case.sets) for t in times] for times in replays)
    found = max(right(case, shape, args, results[i]) for i, args in ends(case.sets))
    (low, ours_median, high), (other_low, other_median, other_high) = (
        statistics.quantiles(times, n=4) for times in (ours, theirs)
    )
    speed = needed / (ours_median * 1e-6)
    return Row(
        *(shape.name, case.name, case.tokens, needed / 1e6, ours_median, (low, high)),
        *(speed / 1e9, speed / copy, other_median, (other_low, other_high), found),
    )


def prepared(dtype: torch.dtype) -> tuple[Pool, float]:
    """Weights on the current CUDA device, and its copy bandwidth in bytes a second. Raises
    RuntimeError where there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("the CUDA kernels need a CUDA device, and there is none here")
    torch.manual_seed(0)
    pool = Pool(dtype, torch.device("cuda", torch.cuda.current_device()), POOL, ROTATED)
    return pool, copy_bandwidth(pool)


def rows(pool: Pool, copy: float, only: str = "", nested: bool = False) -> Iterator[Row]:
    """A row for each case whose name holds `only`. Raises RuntimeError if no kernel serves."""
    for shape in NESTED_SHAPES if nested else SHAPES:
        for case in (nested_cases if nested else cases)(pool, shape):
            if only in case.name:
                yield measured(case, shape, pool, copy)


def machine() -> str:
    """The GPU, the versions and the commit that the numbers are of."""
    import triton

    folder = Path(sirius_runtime.operators.__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return (
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"Triton {triton.__version__}; commit {commit or 'unknown'}"
    )


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--nested", action="store_true", help="the kernels of nested weights")
    args = parser.parse_args()
    try:
        pool, copy = prepared(getattr(torch, args.dtype))
        print(f"{machine()}; {args.dtype}; copy {copy / 1e9:.0f} GB/s; {REPLAYS} replays\n")
        head = header(args.dtype if args.nested else "torch")
        print(f"{line(head)}\n{line(['---'] * len(head))}")
        # Each at once: what is printed is left if the time is up.
        for row in rows(pool, copy, args.only, args.nested):
            print(line(row.cells()), flush=True)
    except RuntimeError as problem:
        parser.exit(1, f"{parser.prog}: {problem}\n")


if __name__ == "__main__":
    sys.exit(finish("benchmarks.gpu_kernels", main))
