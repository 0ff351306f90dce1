"""Times decoding steps at a real model's shapes over random weights, and a period's host time.

    python -m benchmarks.steps
    python -m benchmarks.steps --device cuda --shape 8b

One row after a history of `--context` tokens, in bf16. Each round runs, in turn: the dense step;
the verification of N tokens in one full pass (N = k for a chain, (k - 1) w + 1 for a tree); the
sparse steps of each method at each share skipped; and then other libraries' dense steps. A pause
before each step lets the OpenMP threads of the last one sleep, as OMP_WAIT_POLICY=passive would.
Printed are medians over the rounds with their quartiles, and each one's fastest round, as times and
as shares of the dense step of the same rounds. The *floor* is the bytes that a step reads (weights
once, keys and values) over the bandwidth of the same rounds: of a copy on a GPU, of a read loop on
the CPU. The weights are random, so this measures time, not quality. Thresholds are the quantiles of
one step's values.

On the CPU, steps run operator by operator with the kernels. The dense step also runs with the
reference operators, by transformers (eager, SDPA attention, a DynamicCache) and, if installed, by
llama.cpp. A second table divides a period's time into that inside the entries and that between
them. On a GPU, steps are CUDA graphs, and the dense step also runs operator by operator; with
`--compiled`, the entries are compiled by inductor first. The last table and the plot are computed
from the steps (`benchmarks.advance`).

Each of our steps runs once with its operators compared with their references, on the step's own
inputs; the timed form must give that run's logits (`benchmarks.checked`). Steps of other libraries
have other weights and history, and are not compared.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks import checked, llama_cpp
from benchmarks.advance import SHARE, Measured, plot, table
from benchmarks.kernels import cpu_name
from benchmarks.memory import in_large_pages
from benchmarks.random_programs import METHODS, SHAPES, RandomPrograms, Shape
from sirius_runtime.backends.cuda_graph import GraphReplay
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.backends.inductor import InductorBackend
from sirius_runtime.by_entries import ByEntries
from sirius_runtime.command_line import finish, new_file_argument, positive_number, threads_argument
from sirius_runtime.kernels.native import kernels, references
from sirius_runtime.plan import Plan
from sirius_runtime.policy import likeliest
from sirius_runtime.recorded import Replay, run_at_once
from sirius_runtime.spec import Method
from sirius_runtime.stats import PhaseClock
from sirius_runtime.tensor_state import TensorState

SKIPPED = (0.3, 0.5, 0.65)
CHAINS = (4, 8, 16, 32)  # periods, among the numbers of tokens that are verified
PEERS = ("torch reference", "transformers", "llama.cpp")
AWAKE = 0.03  # seconds after which the last step's threads sleep
PLOTTED = 0.5  # the share skipped whose steps are drawn
BUFFER = {"cpu": 1 << 28, "cuda": 1 << 32}  # bytes, to measure bandwidth


@dataclass
class Step:
    """Something to time, in a context. `bytes`: those that it needs to read."""

    name: str
    bytes: float
    call: Callable[[], object]
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    check: Callable[[object], None] = lambda result: None
    """Checks the call's result; raises WrongResultError if it is wrong."""
    seconds: list[float] = field(default_factory=list)

    def row(self, dense: Step, bandwidth: float) -> str:
        cells = [self.name]
        for best in (statistics.median, min):
            cells.append(f"{best(self.seconds) * 1e3:.3f}")
            if best is not min:
                low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
                cells.append(f"{low * 1e3:.3f}-{high * 1e3:.3f}")
            cells.append(f"{best(self.seconds) / best(dense.seconds):.2f}")
        floor = self.bytes / bandwidth
        cells += [f"{floor * 1e3:.3f}", f"{statistics.median(self.seconds) / floor:.2f}"]
        return "| " + " | ".join(cells) + " |"


def time_on(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds that a call takes; on a GPU, between events before and after it."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3


def roof(device: torch.device) -> Step:
    """Only moves bytes, to measure bandwidth: a copy (read and written) on a GPU, a read loop on
    the CPU, where a copy is slower.
    """
    size = BUFFER[device.type]
    library = kernels()
    if device.type == "cpu" and library is not None:
        source = in_large_pages(size, torch.uint8).random_()
        threads = torch.get_num_threads()
        read = functools.partial(library.sirius_read, source.data_ptr(), size, threads)
        return Step("read loop", size, lambda: (read(), source))
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return Step("copy", 2 * size, lambda: target.copy_(source))


def replay_on(device: torch.device) -> Replay:
    return GraphReplay() if device.type == "cuda" else run_at_once


def recorded(state: TensorState, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The work as a CUDA graph, which reuses its result's memory; on the CPU, unchanged."""
    replay, result = replay_on(state.root.device), []

    def keep() -> None:
        result[:] = [work()]

    def call() -> Tensor:
        replay("step", keep, [])
        return result[0]

    return call


def one_step(state: TensorState, entry: str) -> Tensor:
    """Logits [B, V], and the likeliest token."""
    logits: Tensor = state.step(entry)["logits"][:, 0]
    likeliest(logits)
    return logits


def verify(state: TensorState, tokens: int) -> Tensor:
    """One full pass over a chain: logits [B, T, V]."""
    ids = torch.arange(tokens, device=state.root.device)[None] + 9
    return state.chain("full", ids)["logits"]


def random_llama(layers: int, shape: Shape = SHAPES["1b"]) -> LlamaForCausalLM:
    """transformers' model of a shape, with that many layers, in bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(shape.with_layers(layers).config()).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def transformers_step(model: LlamaForCausalLM, context: int) -> Callable[[], object]:
    """One token after a history, by transformers."""
    config = model.config
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        shape = (2, 1, config.num_key_value_heads, context, config.head_dim)
        keys, values = torch.randn(shape).bfloat16()
        cache.update(keys, values, layer)
    token = torch.tensor([[7]])

    def step() -> None:
        likeliest(model(token, past_key_values=cache).logits[:, 0])
        cache.crop(-1)

    return step


def llama_cpp_step(
    model: LlamaForCausalLM, context: int, threads: int, quantised: str | None = None
) -> Callable[[], object]:
    """One token after a history, by llama.cpp, of the same weights in bfloat16 or `quantised`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        llama_cpp.write_gguf(model, path, quantised)
        peer = llama_cpp.LlamaCpp(path, context + 64, threads)  # mapped, so the file may be removed
    peer.step([7] * context)

    def step() -> None:
        peer.step([7])
        peer.keep(context)

    return step


def host_share(state: TensorState, plan: Plan, rounds: int) -> tuple[float, float]:
    """The median milliseconds of a period, and the share of time outside of the entries."""
    backend, inside = state.backend, [0.0]
    run = backend.run

    def timed(entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        begin = time.perf_counter()
        result = run(entry, inputs)
        inside[0] += time.perf_counter() - begin
        return result

    backend.run = timed  # type: ignore[method-assign]
    length, most = state.length, torch.tensor([plan.period])
    strategy, clock = ByEntries(), PhaseClock(torch.device("cpu"))
    periods, shares = [], []
    for _ in range(rounds):
        state.length, inside[0] = length, 0.0
        begin = time.perf_counter()
        strategy.period(state, plan, most, clock)
        periods.append(time.perf_counter() - begin)
        shares.append(1 - inside[0] / periods[-1])
    backend.run = run  # type: ignore[method-assign]
    state.length = length
    return statistics.median(periods) * 1e3, statistics.median(shares)


class Steps:
    """The steps of one shape on one device."""

    def __init__(self, args: argparse.Namespace, shape: Shape, device: torch.device) -> None:
        self._args, self._shape, self._device = args, shape, device
        self._programs = RandomPrograms(shape, device)
        self._make = compiled_backend if args.compiled else EagerBackend
        self.first = self._programs.state(
            self._programs.backend(Method.GRIFFIN, 0.5, self._make), args.context, 0.5
        )

    def all(self, until: float) -> list[Step]:
        """Yields the steps, each run and checked once, which also allocates, compiles and records.
        Stops when the clock reaches `until`.
        """
        made: list[Step] = []
        for step in self._each():
            with step.within():
                result = step.call()
            step.check(result)
            made.append(step)
            if time.perf_counter() > until:
                break
        return made

    def _each(self) -> Iterator[Step]:
        yield from self._dense()
        yield from self._verifications()
        for skipped in self._args.skipped:
            for method in self._args.methods:
                yield self._sparse(Method(method), skipped)

    def _verifications(self) -> Iterator[Step]:
        for tokens in self._args.verify:
            work = functools.partial(verify, self.first, tokens)
            yield self._step(f"verify {tokens}", self.first, work)
            if self._device.type == "cpu":
                yield self._step(f"verify {tokens}, torch reference", self.first, work, references)

    def _dense(self) -> Iterator[Step]:
        work = functools.partial(one_step, self.first, "full")
        yield self._step("dense", self.first, work)
        yield self._step("dense, torch reference", self.first, work, references)
        if self._device.type == "cpu":
            if not self._args.compiled:
                model, context = random_llama(self._shape.layers, self._shape), self._args.context
                yield self._peer("dense, transformers eager", transformers_step(model, context))
                if llama_cpp.available():
                    peer = llama_cpp_step(model, context, self._args.threads)
                    yield self._peer("dense, llama.cpp", peer)
        else:
            yield self._peer("dense, no CUDA graph", work)

    def _sparse(self, method: Method, skipped: float) -> Step:
        backend = self._programs.backend(method, skipped, self._make)
        state = self._programs.state(backend, self._args.context, skipped)
        work = functools.partial(one_step, state, "sparse")
        name = f"{method}, {skipped:.0%} skipped"
        return self._step(name, state, work, nullcontext, method, skipped)

    def _step(
        self,
        name: str,
        state: TensorState,
        work: Callable[[], Tensor],
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
        method: Method = Method.NONE,
        skipped: float = 0.0,
    ) -> Step:
        """A step over a state, checked operator by operator, and by its logits."""
        backend = state.backend
        assert isinstance(backend, EagerBackend)

        def check(result: object) -> None:
            assert isinstance(result, Tensor)
            with checked.operators(name, backend):
                checked.near(name, result, work(), self._shape.layers)

        read = self._bytes(method, skipped)
        return Step(name, read, recorded(state, work), within, check)

    def _peer(self, name: str, work: Callable[[], object]) -> Step:
        return Step(name, self._bytes(), work)

    def _bytes(self, method: Method = Method.NONE, skipped: float = 0.0) -> float:
        shape = self._shape
        history = 2 * shape.layers * self._args.context * shape.groups * shape.head
        return 2 * (shape.read(method, skipped) + history)


def compiled_backend(*args: Any, **options: Any) -> EagerBackend:
    return InductorBackend(*args, progress=lambda _: None, **options)


def run_rounds(steps: list[Step], device: torch.device, rounds: int, until: float) -> int:
    """Runs every step in turn; returns the number of rounds: at least three, and no more once the
    clock reaches `until`.
    """
    in_turn = sorted(steps, key=lambda step: any(peer in step.name for peer in PEERS))
    for done in range(rounds):
        if done >= 3 and time.perf_counter() > until:
            return done
        for step in in_turn:
            time.sleep(AWAKE)
            with step.within():
                step.seconds.append(time_on(device, step.call))
    return rounds


def machine(device: torch.device) -> str:
    """The device that the steps run on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{torch.get_num_threads()} threads, {cpu_name()}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--layers", type=positive_number, help="fewer than the shape's own")
    parser.add_argument("--context", type=positive_number, default=512)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--skipped", type=float, nargs="+", default=SKIPPED)
    parser.add_argument("--verify", type=positive_number, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--compiled", action="store_true", help="entries compiled by inductor")
    parser.add_argument("--rounds", type=positive_number, default=11)
    parser.add_argument(
        "--plot", type=new_file_argument, help="tokens/s over advance, to this PNG file"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="to end early after")
    parser.add_argument("--threads", type=threads_argument, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    if min(*args.verify, args.rounds, args.threads) < 1:
        parser.error("--verify, --rounds and --threads are 1 or more")
    until = time.perf_counter() + args.seconds
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, shape = torch.device(args.device), SHAPES[args.shape]
    if args.layers:
        shape = shape.with_layers(args.layers)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "there is no CUDA GPU here: leave out --device\n")
    if device.type == "cpu" and kernels() is None:
        parser.exit(1, "the CPU kernels are not available here: see the warning above\n")
    hosts: dict[int, tuple[float, float]] = {}
    with torch.inference_mode():
        moved = roof(device)
        made = Steps(args, shape, device)
        steps = made.all(until)
        moved.call()
        rounds = run_rounds([moved, *steps], device, args.rounds, until)
        if device.type == "cpu":
            for size in (4, 8, 16):
                hosts[size] = host_share(made.first, Plan(size, 1, threshold=0.0), args.rounds)
    bandwidth = moved.bytes / statistics.median(moved.seconds)
    print(
        f"shape {shape.name}, {shape.layers} layers ({2 * shape.read() / 1e9:.2f} GB read a step), "
        f"context {args.context}, bfloat16{', compiled by inductor' if args.compiled else ''}; "
        f"torch {torch.__version__}, {machine(device)}; {rounds} rounds; "
        f"{moved.name} {bandwidth / 1e9:.1f} GB/s\n"
    )
    header = ["step", "ms", "quartiles", "of dense", "fastest ms", "of dense", "floor ms"]
    header += ["ms / floor"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for step in steps:
        print(step.row(steps[0], bandwidth))
    if hosts:
        print("\n| period (griffin, 50% skipped) | ms | outside of entries |\n|---|---|---|")
    for size, (milliseconds, share) in hosts.items():
        print(f"| {size} tokens | {milliseconds:.1f} | {share:.2%} |")
    found = computed(steps)
    if found.sparse and found.verify:
        print(f"\nComputed from these: a token's time over the dense one's, at AAL/k = {SHARE}\n")
        print(table(found))
    if args.plot is not None:
        names = [name for name in found.sparse if name.endswith(f"{PLOTTED:.0%} skipped")]
        title = f"{shape.name}, computed from steps measured on {machine(device)}"
        plot(found, names, title, args.plot)


def computed(steps: Sequence[Step]) -> Measured:
    """The steps' medians, in the form of `benchmarks.advance`."""
    medians = {step.name: statistics.median(step.seconds) for step in steps}
    return Measured(
        dense=medians["dense"],
        sparse={name: value for name, value in medians.items() if name.endswith("skipped")},
        verify={k: medians[f"verify {k}"] for k in CHAINS if f"verify {k}" in medians},
    )


if __name__ == "__main__":
    sys.exit(finish("benchmarks.steps", main))
