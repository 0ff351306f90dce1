"""The time of a period as one graph at a long context, compared with the entries one by one.

    python -m benchmarks.context --context 4096

A random Llama (float32; hidden 1024, 16 heads over 4 key/value heads, MLPs of 4096 neurons)
decodes by griffin after a prompt of `--context` random tokens. Both start each period from the same
state and take turns. Printed are the medians of a period's milliseconds and of their ratio, and the
ratio's quartiles. A graph that copied the caches in its loop would do so k - 1 times a period. One
period by the entries runs first with every operator compared with its reference; all others must
commit its tokens, with its keys and values up to rounding (`benchmarks.checked`).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import checked
from sirius_compile import CompileConfig, compile_model
from sirius_compile.product import Compiled
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.by_entries import ByEntries
from sirius_runtime.command_line import finish, positive_number
from sirius_runtime.decoder import Strategy
from sirius_runtime.loading import BackendName
from sirius_runtime.one_graph import OneGraph
from sirius_runtime.plan import Plan
from sirius_runtime.sizes import cache_slots
from sirius_runtime.stats import PhaseClock
from sirius_runtime.tensor_state import ROWS_OF, TensorState


def random_llama(context: int, layers: int) -> LlamaForCausalLM:
    """A decoder of the sizes above."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=8192,
        max_position_embeddings=context + 512,
    )
    return LlamaForCausalLM(config).eval()


def opened(compiled: Compiled, backend: str, slots: int) -> tuple[TensorState, Strategy]:
    """One row on a back end, and how its periods run."""
    runner = compiled.to_runtime(backend=backend, context=slots - 64).backend
    strategy = OneGraph(runner.limits) if runner.limits else ByEntries()
    return TensorState(runner, 1, slots), strategy


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=positive_number, default=4096)
    parser.add_argument("--period", type=positive_number, nargs="+", default=[4, 16])
    parser.add_argument("--width", type=positive_number, nargs="+", default=[1, 4])
    parser.add_argument("--layers", type=positive_number, default=4)
    parser.add_argument("--repeats", type=positive_number, default=9)
    parser.add_argument("--backend", default="period", choices=["period", "aoti"])
    args = parser.parse_args(arguments)
    model = random_llama(args.context, args.layers)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(8192, (args.context,), generator=generator).tolist()
    print(
        f"context {args.context}, {args.layers} layers, backend {args.backend} against eager; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n"
    )
    header = ("k", "w", "entries ms", "graph ms", "graph / entries", "quartiles")
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for period in args.period:
        for width in args.width:
            config = CompileConfig(sparsity="griffin", period=period, tree_width=width)
            compiled = compile_model(model, config)
            slots = cache_slots(args.context + 64, period, width)
            with torch.inference_mode():
                print(row(compiled, prompt, slots, args.repeats, args.backend), flush=True)


def row(compiled: Compiled, prompt: list[int], slots: int, repeats: int, backend: str) -> str:
    """One line of the table."""
    size, width = compiled.spec.period.period, compiled.spec.period.tree_width
    ways = [opened(compiled, backend, slots) for backend in (BackendName.EAGER, backend)]
    (first, _), clock = ways[0], PhaseClock(torch.device("cpu"))
    logits, _ = first.prefill([prompt])
    first.root = logits.argmax(-1)
    first.choose_neurons()
    start = {name: getattr(first, name) for name in ROWS_OF}
    start = {name: None if value is None else value.clone() for name, value in start.items()}
    plan, most = Plan(size, width, threshold=0.0), torch.tensor([size])
    name = f"k {size}, w {width}"

    def period(state: TensorState, strategy: Strategy) -> tuple[float, list[int]]:
        """Seconds from the start, and the tokens with their number."""
        for own, value in start.items():
            setattr(state, own, None if value is None else value.clone())
        begin = time.perf_counter()
        (packed,) = strategy.period(state, plan, most, clock).packed.tolist()
        return time.perf_counter() - begin, packed

    runner = first.backend
    assert isinstance(runner, EagerBackend)
    with checked.operators(name, runner):
        _, wanted = period(*ways[0])
    stored = first.k_cache, first.v_cache
    seconds: list[list[float]] = [[], []]
    for repeat in range(repeats + 2):
        for (state, strategy), taken in zip(ways, seconds, strict=True):
            spent, packed = period(state, strategy)
            if repeat >= 2:  # the first calls allocate
                taken.append(spent)
            checked.equal(name, packed, wanted)
            used = slice(int(state.length))
            for cache, other in zip((state.k_cache, state.v_cache), stored, strict=True):
                pair = cache[:, :, :, used], other[:, :, :, used]
                checked.near(f"{name}, caches", *pair, compiled.spec.state.layers)
    ratios = [graph / entries for entries, graph in zip(*seconds, strict=True)]
    milliseconds = (f"{statistics.median(taken) * 1e3:.1f}" for taken in seconds)
    quartiles = statistics.quantiles(ratios, n=4)
    cells = (
        str(size),
        str(width),
        *milliseconds,
        f"{statistics.median(ratios):.3f}",
        f"{quartiles[0]:.3f}-{quartiles[2]:.3f}",
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(finish("benchmarks.context", main))
