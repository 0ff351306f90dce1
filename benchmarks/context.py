"""What a period as one graph costs at a long context, against the Session that drives the entries.

    python -m benchmarks.context --context 4096

A random Llama (float32; hidden 1024, 16 heads over 4 key/value heads, MLPs of 4096 neurons)
decodes by griffin after a prompt of `--context` random tokens. Both start each period from the same
state and take it in turns; printed are the medians of a period's seconds, of their ratio, and the
ratio's quartiles. A graph that copied the caches in its loop would pay for it k - 1 times a period.
A period of the Session is run first with every operator compared with its reference, and all of
them must commit its tokens, with its keys and values but for rounding (`benchmarks.checked`).
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
from sirius_runtime.command_line import finish, positive_number
from sirius_runtime.loading import BackendName
from sirius_runtime.period_session import PeriodSession
from sirius_runtime.plan import Plan
from sirius_runtime.session import Session
from sirius_runtime.sizes import cache_slots
from sirius_runtime.stats import PhaseClock, StatsRecorder


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


def open_session(compiled: Compiled, kind: type[Session], backend: str, slots: int) -> Session:
    """A Session of one row on a back end."""
    runner = compiled.to_runtime(backend=backend, context=slots - 64).backend
    recorder = StatsRecorder(1, 0, 0, PhaseClock(runner.device))
    return kind(runner, 1, slots, recorder)


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
    header = ("k", "w", "Session ms", "graph ms", "graph / Session", "quartiles")
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
    entries = open_session(compiled, Session, BackendName.EAGER, slots)
    graph = open_session(compiled, PeriodSession, backend, slots)
    entries.prefill([prompt])
    start = {"length": entries.length, "root": entries.root}
    plan, most = Plan(size, width, threshold=0.0), torch.tensor([size])
    seconds: dict[Session, list[float]] = {entries: [], graph: []}
    caches = {name: value.clone() for name, value in entries._state.items()}
    statistic, name = entries._statistic, f"k {size}, w {width}"

    def period(session: Session) -> tuple[float, list[int]]:
        """Seconds from the start, and the tokens with their number."""
        session.length, session.root = start["length"], start["root"]
        session.active = torch.ones(1, dtype=torch.bool)
        session._state = {name: value.clone() for name, value in caches.items()}
        session._statistic = statistic
        begin = time.perf_counter()
        (packed,) = session.period(plan, most).packed.tolist()
        return time.perf_counter() - begin, packed

    backend = entries._backend
    assert isinstance(backend, EagerBackend)
    with checked.operators(name, backend):
        _, wanted = period(entries)
    stored = entries._state
    for repeat in range(repeats + 2):
        for session, taken in seconds.items():
            spent, packed = period(session)
            if repeat >= 2:  # the first calls pay for allocation
                taken.append(spent)
            checked.equal(name, packed, wanted)
            for cache in ("k_cache", "v_cache"):
                used = slice(int(session.length))
                layers = compiled.spec.state.layers
                found, other = (state[cache][:, :, :, used] for state in (session._state, stored))
                checked.near(f"{name}, {cache}", found, other, layers)
    ratios = [g / s for s, g in zip(seconds[entries], seconds[graph], strict=True)]
    milliseconds = (f"{statistics.median(taken) * 1e3:.1f}" for taken in seconds.values())
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
