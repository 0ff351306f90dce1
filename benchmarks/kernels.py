"""The CPU kernels' share of the machine's read bandwidth, and torch's, at Llama-3.2-1B shapes.

    python -m benchmarks.kernels

Hidden 2048, MLPs of 8192 neurons, 32 heads over 8 key/value heads of 64, vocabulary 128256; bf16
by default. GB/s counts the bytes that a call needs to read, once each: weights, and keys and values
in use; not activations. A call's weights come from a pool several times the size of the last-level
cache, so that the cache is cold. Every round runs the read loop, then every case by kernel, then
every case by torch; torch comes last because its threads keep spinning after a call and would slow
other code down. Printed are the medians over the rounds, and the same for each one's fastest round,
which other work on the machine disturbs less. torch is `F.linear` for linears, else the operators'
references, which also read what they mask. Before anything is timed, each case's result is compared
with its reference's (`benchmarks.checked`).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sirius_runtime.operators  # noqa: F401  (registers the operators)
from benchmarks import checked
from benchmarks.memory import in_large_pages
from sirius_runtime.command_line import finish, positive_number, threads_argument
from sirius_runtime.kernels.native import kernels, references

HIDDEN, NEURONS, HEADS, GROUPS, HEAD, VOCABULARY = 2048, 8192, 32, 8, 64, 128_256
POOL, READ = 1 << 29, 1 << 26  # bytes: of all weights (the largest is more), of a read loop's turn
SKIPPED = (0.5, 0.7, 0.9)
sirius = torch.ops.sirius


@dataclass
class Case:
    """A call, the bytes that it needs to read, and its times."""

    name: str
    tokens: int
    bytes: float
    operator: Callable[..., object]
    arguments: Callable[[], Sequence[Any]]
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"kernel": [], "torch": []})

    def call(self) -> object:
        return self.operator(*self.arguments())

    def check(self) -> None:
        """Raises WrongResultError if the kernel is wrong."""
        checked.call(f"{self.name}, {self.tokens} tokens", self.operator, self.arguments())

    def time(self, side: str) -> None:
        self.call()  # warm-up: in a step, the call before has woken the threads
        begin = time.perf_counter()
        self.call()
        self.seconds[side].append(time.perf_counter() - begin)

    def row(self, reads: list[float]) -> str:
        """A line of the table; `reads`: the seconds that the read loop took over READ bytes."""
        cells = [self.name, str(self.tokens)]
        for best in (statistics.median, min):
            kernel, reference = (best(self.seconds[side]) for side in ("kernel", "torch"))
            speed, roof = self.bytes / kernel, READ / best(reads)
            cells += [f"{kernel * 1e3:.3f}", f"{speed / 1e9:.1f}", f"{speed / roof:.0%}"]
            cells += [f"{reference / kernel:.2f}"]
        return "| " + " | ".join(cells) + " |"


class Pool:
    """Weights of any shape, cut from one large buffer, never the same ones twice in a row.

    They are in pages of 2 MiB, like an artifact's weights if the file system supports it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        size = max(POOL, VOCABULARY * HIDDEN * dtype.itemsize)
        self.buffer = in_large_pages(size // dtype.itemsize, dtype).normal_(std=0.02)
        self._at = 0

    def take(self, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        if self._at + size > self.buffer.numel():
            self._at = 0
        self._at += size
        return self.buffer[self._at - size : self._at].view(shape)


def linear_cases(pool: Pool, tokens: int) -> Iterator[Case]:
    shapes = {"q, o": (HIDDEN, HIDDEN), "k, v": (GROUPS * HEAD, HIDDEN)}
    shapes |= {"lm_head": (VOCABULARY, HIDDEN)}
    x = torch.randn(1, tokens, HIDDEN).to(pool.buffer.dtype)
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * x.itemsize
        yield Case(
            f"linear {name} {list(shape)}",
            tokens,
            size,
            sirius.linear.default,
            lambda shape=shape: (x, pool.take(*shape)),
        )
    yield Case(
        f"linear of a transposed weight [{HIDDEN}, {NEURONS}]",
        tokens,
        HIDDEN * NEURONS * x.itemsize,
        sirius.linear.default,
        lambda: (x, pool.take(HIDDEN, NEURONS).t()),
    )


def mlp_cases(pool: Pool, tokens: int) -> Iterator[Case]:
    x = torch.randn(1, tokens, HIDDEN).to(pool.buffer.dtype)
    row = HIDDEN * x.itemsize

    def weights() -> list[object]:
        matrices = [pool.take(NEURONS, HIDDEN) for _ in range(3)]
        return [x, *matrices, None, None, None, "silu", 0]

    yield Case("dense_mlp", tokens, 3 * NEURONS * row, sirius.dense_mlp.default, weights)
    if tokens > 8:
        return
    sample = torch.nn.functional.silu(torch.nn.functional.linear(x, pool.take(NEURONS, HIDDEN)))
    score = sample.float().abs().mean((0, 1))
    for skipped in SKIPPED:
        keep = round(NEURONS * (1 - skipped))
        threshold = score.quantile(skipped).item()
        neurons = torch.randperm(NEURONS)[:keep].sort().values.expand(1, 1, keep)
        kept = 2 * keep + NEURONS
        share = f"{skipped:.0%} skipped"
        yield Case(
            f"griffin_mlp, {share}",
            tokens,
            3 * keep * row,
            sirius.griffin_mlp.default,
            lambda neurons=neurons: (*weights(), neurons),
        )
        yield Case(
            f"topk_mlp, {share}",
            tokens,
            kept * row,
            sirius.topk_mlp.default,
            lambda keep=keep: (*weights(), keep),
        )
        yield Case(
            f"cats_mlp, {share}",
            tokens,
            kept * row,
            sirius.cats_mlp.default,
            lambda threshold=threshold: (*weights(), threshold),
        )


def channel_cases(pool: Pool, tokens: int) -> Iterator[Case]:
    for inputs, outputs in ((HIDDEN, HIDDEN), (HIDDEN, NEURONS), (NEURONS, HIDDEN)):
        x = torch.randn(1, tokens, inputs).to(pool.buffer.dtype)
        score = x.float().abs().mean((0, 1))
        for skipped in SKIPPED:
            threshold = score.quantile(skipped).item()
            kept = int((score > threshold).sum())
            yield Case(
                f"sparse_linear [{inputs}, {outputs}], {skipped:.0%} skipped",
                tokens,
                kept * outputs * x.itemsize,
                sirius.sparse_linear.default,
                lambda x=x, shape=(inputs, outputs), threshold=threshold: (
                    *(x, pool.take(*shape), None),
                    threshold,
                ),
            )


def attention_cases(pool: Pool, tokens: int, context: int) -> Iterator[Case]:
    dtype, slots = pool.buffer.dtype, context + 64
    q = torch.randn(1, HEADS, tokens, HEAD).to(dtype)
    k, v = (torch.randn(1, GROUPS, tokens, HEAD).to(dtype) for _ in range(2))
    length = torch.tensor([context])
    at = length[:, None] + torch.arange(tokens)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    mask = distance.clamp(min=-1)[None]
    layers = max(2, (1 << 28) // (slots * GROUPS * HEAD * 4))
    caches = [torch.randn(layers, 1, GROUPS, slots, HEAD).to(dtype) for _ in range(2)]
    turn = count()
    yield Case(
        f"cached_attention, {context} tokens in use",
        tokens,
        2 * context * GROUPS * HEAD * dtype.itemsize,
        sirius.cached_attention.default,
        lambda: (
            *(q, k, v, *caches, at, at, length, mask),
            *(next(turn) % layers, 0.125, None, None),
        ),
    )


def cpu_name() -> str:
    """The name of the machine's CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=positive_number, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--context", type=positive_number, nargs="+", default=[512, 4096])
    parser.add_argument("--rounds", type=positive_number, default=15)
    parser.add_argument("--threads", type=threads_argument, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="cases whose name holds this")
    args = parser.parse_args(arguments)
    if min(*args.tokens, *args.context, args.rounds, args.threads) < 1:
        parser.error("--tokens, --context, --rounds and --threads are 1 or more")
    torch.set_num_threads(args.threads)
    library = kernels()
    if library is None:
        parser.exit(1, "the CPU kernels are not available here: see the warning above\n")
    torch.manual_seed(0)
    pool = Pool(getattr(torch, args.dtype))
    cases = [
        case
        for tokens in args.tokens
        for cases in (
            linear_cases(pool, tokens),
            mlp_cases(pool, tokens),
            channel_cases(pool, tokens) if tokens == 1 else (),
            *(attention_cases(pool, tokens, context) for context in args.context),
        )
        for case in cases
        if args.only in case.name
    ]
    reads: list[float] = []
    with torch.inference_mode():
        for case in cases:
            case.check()
        for turn in range(args.rounds + 2):
            for start in range(0, POOL, READ):
                begin = time.perf_counter()
                library.sirius_read(pool.buffer.data_ptr() + start, READ, args.threads)
                reads.append(time.perf_counter() - begin)
            for case in cases:
                case.time("kernel")
            with references():
                for case in cases:
                    case.time("torch")
            if turn == 1:  # the first rounds allocate
                reads.clear()
                for case in cases:
                    case.seconds = {side: [] for side in case.seconds}
    roofs = [READ / best(reads) / 1e9 for best in (statistics.median, min)]
    print(
        f"{args.dtype}; torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{cpu_name()}; {args.rounds} rounds; "
        f"read loop {roofs[0]:.1f} GB/s, fastest {roofs[1]:.1f} GB/s\n"
    )
    header = ["call", "tokens", "ms", "GB/s", "of read", "torch / ours"]
    header += ["fastest ms", "GB/s", "of read", "torch / ours"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for case in cases:
        print(case.row(reads))


if __name__ == "__main__":
    sys.exit(finish("benchmarks.kernels", main))
