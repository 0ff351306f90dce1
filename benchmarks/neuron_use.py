"""Measures whether weights in part-layers would be worth holding: how unevenly drafts use neurons
and channels, and what reading single ones from the disk costs.

    python -m benchmarks.neuron_use topk.sirius teal.sirius

A placement by neurons would hold those that drafts use most, and read the others from the file once
a token's choice is known. It gains where few units (neurons of an MLP, input channels of a linear)
take most of the reads, and where reads of single units are as fast as those of whole tensors.

Use is counted at every draft step of answers to `PROMPTS`. The units are ordered by their use in
the answers to the first half of the prompts; printed is the share of reads that the first units
take in the other half, and the share if all units were used equally. *best* is that of the order by
the same half's own use, which no calibration can exceed. A *block* is 16 successive units as they
are stored: its *read* is the share of steps that use at least one of them.

Reads of the disk are direct, by the threads that stream weights, at random offsets of the file.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Mapping
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sirius_runtime.artifact import Artifact
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.command_line import finish, path_argument, positive_number
from sirius_runtime.entries import SPARSE
from sirius_runtime.loading import load
from sirius_runtime.operators import OPERATORS
from sirius_runtime.ops.mlp import ACTIVATIONS
from sirius_runtime.tiers.direct_file import DirectFile
from sirius_runtime.tiers.stream import Load

PROMPTS = (
    'def merge(first, second):\n    """Merges two sorted lists."""\n',
    "Question: A train travels 60 miles in 1.5 hours. How far in 4 hours?\nAnswer:",
    "The history of the printing press begins",
    'class Stack:\n    """A stack with push, pop and peek."""\n',
    "Question: Anna has 12 apples and gives away a third. How many are left?\nAnswer:",
    "Dear Ms. Rossi, thank you for your letter of",
)
SHARES = (0.1, 0.25, 0.5, 0.75)
BLOCK = 16  # units
READS = tuple(2**power for power in (12, 14, 16, 18, 20, 22))  # bytes of one read
READ = 256 * 2**20  # the most bytes of a row of the table of reads
_ROWS = {
    row.overload: row
    for row in map(OPERATORS.__getitem__, ("topk_mlp", "cats_mlp", "sparse_linear"))
}


class Uses(fx.Interpreter):
    """Runs a sparse step of one row, and keeps which units each call reads.

    `kept`: for each call's name, a mask bool [units] per step.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.kept: dict[str, list[Tensor]] = defaultdict(list)
        self._name = ""

    def run_node(self, n: fx.Node) -> Any:
        self._name = n.name
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        row = _ROWS.get(target)
        if row is not None:
            scores = _scores(args) if row.name.endswith("_mlp") else args[0].float().abs()
            limit = args[-1]
            if not row.has_threshold:  # the count that is kept
                limit = scores.flatten().topk(limit).values[-1]
            self.kept[self._name].append((scores >= limit).view(-1))
        return super().call_function(target, args, kwargs)


def _scores(args: Any) -> Tensor:
    """|act(gate x)| by the kernels; the arguments are those of `MLP_SCHEMA`."""
    x, gate, gate_bias, act = args[0], args[1], args[4], args[7]
    return ACTIVATIONS[act](torch.ops.sirius.linear(x, gate, gate_bias)).abs()


def uses(path: Path, tokens: int) -> dict[str, tuple[Tensor, Tensor]]:
    """For each call of the sparse path that skips units: its masks, bool [steps, units], at the
    draft steps of the first half of the prompts, and of the others.
    """
    model = load(path, device="cpu", verify=False)
    backend = model.backend
    assert isinstance(backend, EagerBackend)
    sparse = backend._entries[SPARSE]
    kept, run = Uses(sparse.module), backend.run

    @torch.inference_mode()
    def watched(entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if entry != SPARSE:
            return run(entry, inputs)
        return backend._named(entry, kept.run(*sparse.arguments(inputs)))

    backend.run = watched  # type: ignore[method-assign]
    steps = 0
    for number, prompt in enumerate(PROMPTS):
        if number == len(PROMPTS) // 2:
            steps = max(map(len, kept.kept.values()))
        model.generate(prompt, max_new_tokens=tokens, fallback=False, lookup=0, eos_token_id=[])
    return {
        name: (torch.stack(masks[:steps]), torch.stack(masks[steps:]))
        for name, masks in kept.kept.items()
    }


def covered(masks: Tensor, order: Tensor, share: float) -> float:
    """The share of the reads of masks [steps, units] that the first units of an order take."""
    first = order[: round(share * len(order))]
    return (masks[:, first].sum() / masks.sum()).item()


def print_uses(path: Path, tokens: int) -> None:
    """The table of an artifact, by kinds of call."""
    kinds: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for name, masks in uses(path, tokens).items():
        operator = name.rstrip("0123456789").rstrip("_")
        kinds[f"{operator}, {masks[0].shape[1]:,} units"].append(masks)
    for kind, sites in kinds.items():
        steps = len(sites[0][1])
        blocks = [later.unfold(1, BLOCK, BLOCK).any(-1).float().mean() for _, later in sites]
        kept = [later.float().mean() for _, later in sites]
        print(
            f"\n{path.name}: {kind}, {len(sites)} calls, {steps} steps; "
            f"{torch.stack(kept).mean():.2f} of units and {torch.stack(blocks).mean():.2f} of "
            f"blocks of {BLOCK} are read\n"
        )
        print("| held | if used equally | takes of the reads | best |\n|---|---|---|---|")
        for share in SHARES:
            known, best = [], []
            for first, later in sites:
                known.append(covered(later, first.sum(0).argsort(descending=True), share))
                best.append(covered(later, later.sum(0).argsort(descending=True), share))
            means = [sum(found) / len(found) for found in (known, best)]
            print(f"| {share:.0%} | {share:.0%} | {means[0]:.0%} | {means[1]:.0%} |", flush=True)


def print_reads(path: Path) -> None:
    """The table of reads of the disk."""
    draws = random.Random(0)
    with Artifact.open(path, verify=False) as artifact:
        assert artifact.file is not None
        print("\n| bytes of a read | GB/s | reads/s |\n|---|---|---|")
        size = path.stat().st_size
        for one in READS:
            count = min(READ // one, 8192)
            file = DirectFile(artifact.file, mmap(-1, count * one))
            places = [draws.randrange(size // one) * one for _ in range(count)]
            begin = time.perf_counter()
            pending = [
                file.fetch(Load(first, one, min(one, size - first), at * one))
                for at, first in enumerate(places)
            ]
            for fetch in pending:
                fetch.wait()
            seconds = time.perf_counter() - begin
            file.close()
            print(f"| {one:,} | {count * one / seconds / 1e9:.2f} | {count / seconds:,.0f} |")


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("artifacts", type=path_argument, nargs="+", metavar="MODEL.sirius")
    parser.add_argument("--tokens", type=positive_number, default=64, help="of each answer")
    args = parser.parse_args()
    print_reads(args.artifacts[0])
    for path in args.artifacts:
        print_uses(path, args.tokens)
    return None


if __name__ == "__main__":
    raise SystemExit(finish("benchmarks.neuron_use", main))
