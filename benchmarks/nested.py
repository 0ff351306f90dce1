"""Times steps with nested weights: 8 bits in two planes, of which a draft reads the high one.

    python -m benchmarks.nested

There is one row after a history of `--context` tokens, at Qwen2.5-1.5B's shapes with random
weights: reads and arithmetic are those of the real model, tokens are not. Each round runs every
step in turn: the dense step and the verification of 16 tokens with bfloat16 weights and with both
planes of nested ones; the draft step with the high plane alone, and also with half of the neurons
(`topk`) or four tenths of the channels (`teal`). Printed are medians over the rounds, the fastest
round, and the ratios that determine a period's time, each with its goal. GB/s counts the bytes of
the weights that a step reads, once each. If llama.cpp is installed (`pip install --group bench`),
its steps with Q8_0 and Q4_0 weights of the same shapes run in the same rounds.

Run it with OMP_WAIT_POLICY=passive, as `sirius run` sets it: otherwise torch's spinning threads
take the cores from the kernels. Each of our steps runs once with its operators compared with their
references, on the step's own inputs (`benchmarks.checked`).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks import checked, llama_cpp
from benchmarks.random_programs import SHAPES, RandomPrograms
from benchmarks.steps import (
    Step,
    llama_cpp_step,
    machine,
    one_step,
    random_llama,
    run_rounds,
    verify,
)
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.command_line import finish, positive_number, threads_argument
from sirius_runtime.kernels.native import kernels
from sirius_runtime.spec import Method

VERIFIED = 16
GOALS = (
    ("int8, dense", "bfloat16, dense", 0.56),
    ("int8, dense", "llama.cpp Q8_0", 1.0),
    ("high nibbles", "bfloat16, dense", 0.33),
    ("high nibbles", "llama.cpp Q4_0", 1.0),
    ("high nibbles, topk .5", "high nibbles", 0.75),
    ("high nibbles, teal .6", "high nibbles", 0.75),
    (f"int8, {VERIFIED} tokens", "int8, dense", 1.4),
    (f"bfloat16, {VERIFIED} tokens", "bfloat16, dense", None),
)
"""A step, the one that it is a share of, and the share that is wanted."""


class Steps:
    """The steps of one shape, checked as they are made."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._shape = SHAPES[args.shape].with_layers(args.layers or SHAPES[args.shape].layers)

    def all(self) -> list[Step]:
        plain = self._programs(None)
        both, high = self._programs(8), self._programs(4)
        high._pool = both._pool  # one copy, as an artifact has it
        dense = self._step("bfloat16, dense", plain, "full")
        chain = self._step(f"bfloat16, {VERIFIED} tokens", plain, "full", tokens=VERIFIED)
        return [
            dense,
            self._step("int8, dense", both, "full"),
            self._step("high nibbles", high, "sparse"),
            self._step("high nibbles, topk .5", high, "sparse", Method.TOPK, 0.5),
            self._step("high nibbles, teal .6", high, "sparse", Method.TEAL, 0.6),
            chain,
            self._step(f"int8, {VERIFIED} tokens", both, "full", tokens=VERIFIED),
            *self._peers(),
        ]

    def _peers(self) -> Iterator[Step]:
        if not llama_cpp.available():
            return
        model = random_llama(self._shape.layers, self._shape)
        for kind, bits in (("Q8_0", 8.5), ("Q4_0", 4.5)):
            step = llama_cpp_step(model, self._args.context, self._args.threads, kind)
            yield Step(f"llama.cpp {kind}", self._shape.read() * bits / 8, step)

    def _programs(self, draft_bits: int | None) -> RandomPrograms:
        return RandomPrograms(self._shape, torch.device("cpu"), draft_bits=draft_bits)

    def _step(
        self,
        name: str,
        programs: RandomPrograms,
        entry: str,
        method: Method = Method.NONE,
        skipped: float = 0.0,
        tokens: int = 1,
    ) -> Step:
        backend = programs.backend(method, skipped)
        state = programs.state(backend, self._args.context, skipped)
        work: Callable[[], Tensor]
        if tokens == 1:
            work = functools.partial(one_step, state, entry)
        else:
            work = functools.partial(verify, state, tokens)
        self._check(name, backend, work)
        bits = 16.0 if programs.draft_bits is None else 4.25 if entry == "sparse" else 8.5
        return Step(name, self._shape.read(method, skipped) * bits / 8, work)

    def _check(self, name: str, backend: EagerBackend, work: Callable[[], Tensor]) -> None:
        with checked.operators(name, backend):
            result = work()
        checked.near(name, work(), result, self._shape.layers)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1.5b", choices=SHAPES)
    parser.add_argument("--layers", type=positive_number, help="fewer than the shape's own")
    parser.add_argument("--context", type=positive_number, default=512)
    parser.add_argument("--rounds", type=positive_number, default=15)
    parser.add_argument("--threads", type=threads_argument, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if kernels() is None:
        parser.exit(1, "the CPU kernels are not available here: see the warning above\n")
    with torch.inference_mode():
        steps = Steps(args).all()
        run_rounds(steps, torch.device("cpu"), args.rounds, float("inf"))
    layers = args.layers or SHAPES[args.shape].layers
    print(
        f"shape {args.shape}, {layers} layers, context {args.context}; torch {torch.__version__}, "
        f"{machine(torch.device('cpu'))}; {args.rounds} rounds\n"
    )
    print("| step | ms | fastest | GB read | GB/s |\n|---|---|---|---|---|")
    middle = {step.name: statistics.median(step.seconds) for step in steps}
    for step in steps:
        print(
            f"| {step.name} | {middle[step.name] * 1e3:.2f} | {min(step.seconds) * 1e3:.2f} | "
            f"{step.bytes / 1e9:.3f} | {step.bytes / middle[step.name] / 1e9:.1f} |"
        )
    print("\n| ratio | of medians | goal |\n|---|---|---|")
    for name, base, goal in GOALS:
        if base not in middle:
            continue
        wanted = "" if goal is None else f"{goal:.2f}"
        print(f"| {name} / {base} | {middle[name] / middle[base]:.2f} | {wanted} |")


if __name__ == "__main__":
    sys.exit(finish("benchmarks.nested", main))
