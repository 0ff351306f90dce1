"""The time of a recorded period compared with the same entries run one by one.

    python -m benchmarks.periods --device cuda --shape 8b

One row of griffin at 50% after a history of `--context` tokens, random weights, threshold 0 (every
draft is accepted, so that each period does the same work). Both start from the same state and take
turns; printed are the medians of a period's milliseconds from the call to the tokens on the host,
of their ratio, and the ratio's quartiles. On a GPU, the recording is a CUDA graph. On the CPU
nothing is recorded: both sides do the same work, and the ratio means nothing. One period by the
entries runs with every operator compared with its reference, and each pair of periods must commit
the same tokens (`benchmarks.checked`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from benchmarks import checked
from benchmarks.random_programs import SHAPES, RandomPrograms, Shape
from benchmarks.steps import compiled_backend, machine, replay_on
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.by_entries import ByEntries
from sirius_runtime.command_line import finish, positive_number
from sirius_runtime.decoder import Strategy, Way
from sirius_runtime.plan import Plan
from sirius_runtime.recorded import Recorded, Storage
from sirius_runtime.spec import Method
from sirius_runtime.stats import PhaseClock
from sirius_runtime.tensor_state import ROWS_OF, TensorState

SKIPPED = 0.5


Entrant = tuple[TensorState, Strategy]


def both(programs: RandomPrograms, backend: EagerBackend, context: int, size: int) -> list[Entrant]:
    """The entries and their recording, in the same state."""
    driven, held = (programs.state(backend, context, SKIPPED) for _ in range(2))
    for name in ROWS_OF:
        value = getattr(driven, name)
        setattr(held, name, None if value is None else value.clone())
    storage = Storage(held, size, replay_on(programs.device))
    recorded = Recorded(Way.DRAFT, ByEntries(all_levels=True), storage)
    return [(driven, ByEntries()), (held, recorded)]


def one_period(
    state: TensorState, strategy: Strategy, plan: Plan, context: int
) -> tuple[float, list[int]]:
    """Seconds of one period from `context` tokens on, to the tokens on the host; those tokens, and
    how many are committed.
    """
    device = state.root.device
    state.length.fill_(context)
    state.root.fill_(7)
    most = torch.full((1,), plan.period, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    (packed,) = strategy.period(state, plan, most, PhaseClock(device)).packed.tolist()
    return time.perf_counter() - begin, packed


def rows(args: argparse.Namespace, shape: Shape, device: torch.device) -> Iterator[str]:
    programs = RandomPrograms(shape, device)
    backend = programs.backend(
        Method.GRIFFIN, SKIPPED, compiled_backend if args.compiled else EagerBackend
    )
    for size in args.period:
        for width in args.width:
            pair = both(programs, backend, args.context, size)
            plan = Plan(size, width, threshold=0.0)
            name = f"k {size}, w {width}"
            with checked.operators(name, backend):
                _, wanted = one_period(*pair[0], plan, args.context)
            taken: tuple[list[float], list[float]] = ([], [])
            for turn in range(args.rounds + 2):
                results = [one_period(*way, plan, args.context) for way in pair]
                (_, driven), (_, replayed) = results
                checked.equal(name, replayed, driven)
                if not args.compiled:  # compiled code rounds differently, so tokens may differ
                    checked.equal(name, driven, wanted)
                for (spent, _), seconds in zip(results, taken, strict=True):
                    if turn >= 2:  # the first ones allocate and record
                        seconds.append(spent)
            ratios = [static / driven for driven, static in zip(*taken, strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
            cells = [str(size), str(width)]
            cells += [f"{statistics.median(seconds) * 1e3:.2f}" for seconds in taken]
            cells += [f"{statistics.median(ratios):.3f}", f"{low:.3f}-{high:.3f}"]
            yield "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--layers", type=positive_number, help="fewer than the shape's own")
    parser.add_argument("--context", type=positive_number, default=512)
    parser.add_argument("--period", type=positive_number, nargs="+", default=[4, 16])
    parser.add_argument("--width", type=positive_number, nargs="+", default=[1, 4])
    parser.add_argument("--compiled", action="store_true", help="entries compiled by inductor")
    parser.add_argument("--rounds", type=positive_number, default=11)
    args = parser.parse_args(arguments)
    device, shape = torch.device(args.device), SHAPES[args.shape]
    if args.layers:
        shape = shape.with_layers(args.layers)
    print(
        f"shape {shape.name}, {shape.layers} layers, context {args.context}, bfloat16"
        f"{', compiled by inductor' if args.compiled else ''}; torch {torch.__version__}, "
        f"{machine(device)}; {args.rounds} rounds\n"
    )
    header = ("k", "w", "entries ms", "recorded ms", "recorded / entries", "quartiles")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    with torch.inference_mode():
        for row in rows(args, shape, device):
            print(row, flush=True)


if __name__ == "__main__":
    sys.exit(finish("benchmarks.periods", main))
