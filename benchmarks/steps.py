"""Whole steps of a decoder with Llama-3.2-1B's shapes and random weights, and a period's host time.

    python -m benchmarks.steps

One row after a history of `--context` tokens, in bf16. Each round runs, in turn: the dense step
with the kernels, with the reference operators, and by transformers (eager, SDPA attention, a
DynamicCache); the sparse steps of each method at each share skipped; and the verification of N
tokens in one full pass, with the kernels and without. Printed are medians over the rounds and each
one's fastest round, as times and as shares of the dense step with kernels. The weights are random:
what a step reads and computes is real, what it says is not, so nothing here speaks of quality. The
thresholds of `cats` are the quantiles of one step's own activations.

The second table is where a period's time goes: inside the entries, or in what stands between them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.kernels import cpu_name
from sirius_compile import CompileConfig, compile_model
from sirius_compile.compile import Compiled
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.graph import to_document
from sirius_runtime.kernels.native import kernels, references
from sirius_runtime.ops.mlp import ACTIVATIONS
from sirius_runtime.plan import Plan
from sirius_runtime.session import Session
from sirius_runtime.sizes import cache_slots
from sirius_runtime.stats import PhaseClock, StatsRecorder

SKIPPED = (0.3, 0.5, 0.65)
sirius = torch.ops.sirius


def random_llama(layers: int) -> LlamaForCausalLM:
    """The shapes of Llama-3.2-1B, with fewer layers where asked for."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


@dataclass
class Step:
    """Something to time, within a context of its own."""

    name: str
    call: Callable[[], object]
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    seconds: list[float] = field(default_factory=list)

    def time(self) -> None:
        with self.within():
            begin = time.perf_counter()
            self.call()
            self.seconds.append(time.perf_counter() - begin)


class Programs:
    """Back ends of several sparse paths over one copy of the weights."""

    def __init__(self, model: LlamaForCausalLM, context: int) -> None:
        self._model, self._context = model, context
        self._weights: Mapping[str, Tensor] | None = None

    def session(self, method: str, keep: float) -> Session:
        """A session of one row with `context` tokens behind it."""
        compiled = compile_model(self._model, CompileConfig(sparsity=method, keep=keep))
        return self.open(self._backend(compiled))

    def open(self, backend: EagerBackend) -> Session:
        recorder = StatsRecorder(1, 0, 0, PhaseClock(backend.device))
        session = Session(backend, 1, cache_slots(self._context, 64, 1), recorder)
        for cache in session._state.values():
            cache.normal_()
        sparsity = backend.program.sparsity
        if sparsity.kept_neurons:
            layers = backend.program.state.layers
            order = torch.rand(layers, 1, sparsity.neurons).argsort(-1)
            session._state["neurons"] = order[..., : sparsity.kept_neurons].sort().values
        session.length = torch.tensor([self._context])
        session.root = torch.tensor([7])
        return session

    def _backend(self, compiled: Compiled) -> EagerBackend:
        if self._weights is None:
            backend = compiled.to_runtime().backend
            assert isinstance(backend, EagerBackend)
            self._weights = backend.weights
            return backend
        documents = {
            name: to_document(compiled.program.graphs[name]) for name in ("sparse", "full")
        }
        return EagerBackend(
            compiled.spec,
            documents,
            self._weights,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
        )


class Thresholds(fx.Interpreter):
    """Runs a step of `topk`, and learns which threshold keeps as many neurons of each layer."""

    def __init__(self, module: fx.GraphModule, skipped: float) -> None:
        super().__init__(module)
        self._skipped = skipped
        self.found: list[float] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is sirius.topk_mlp.default:
            x, gate, *_, act, _, _ = args
            g = ACTIVATIONS[act](torch.nn.functional.linear(x, gate))
            self.found.append(g.float().abs().quantile(self._skipped).item())
        return super().call_function(target, args, kwargs)


def cats_of(session: Session, skipped: float) -> None:
    """Makes a session's sparse path, which is `topk`, one of `cats` that skips as much."""
    backend = session._backend
    assert isinstance(backend, EagerBackend)
    entry = backend._entries["sparse"]
    learner = Thresholds(entry.module, skipped)
    run, entry.runs = entry.runs, learner.run  # type: ignore[assignment]
    one_step(session, "sparse")
    entry.runs = run
    graph, found = entry.module.graph, iter(learner.found)
    for node in graph.find_nodes(op="call_function", target=sirius.topk_mlp.default):
        with graph.inserting_before(node):
            both = graph.call_function(sirius.cats_mlp.default, (*node.args[:-1], next(found)))
            node.replace_all_uses_with(graph.call_function(lambda pair: pair[0], (both,)))
        graph.erase_node(node)
    entry.module.recompile()
    entry.runs = None


def one_step(session: Session, entry: str) -> None:
    session._step(entry)["logits"].argmax(-1)


def verify(session: Session, tokens: int) -> None:
    """One full pass over a chain."""
    index = torch.arange(tokens)
    distance = (index[:, None] - index).clamp(min=-1)
    ids = index[None] + 9
    session._run("full", ids, slots=index, depth=index, tree_mask=distance[None])


def transformers_step(model: LlamaForCausalLM, context: int) -> Callable[[], object]:
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*(torch.randn(1, 8, context, 64).bfloat16() for _ in range(2)), layer)
    token = torch.tensor([[7]])

    def step() -> None:
        model(token, past_key_values=cache).logits.argmax(-1)
        cache.crop(-1)

    return step


def host_share(session: Session, plan: Plan, rounds: int) -> tuple[float, float]:
    """Median milliseconds of a period, and the share of it that is spent outside of entries."""
    backend, inside = session._backend, [0.0]
    run = backend.run

    def timed(entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        begin = time.perf_counter()
        result = run(entry, inputs)
        inside[0] += time.perf_counter() - begin
        return result

    backend.run = timed  # type: ignore[method-assign]
    length, most = session.length, torch.tensor([plan.size])
    periods, shares = [], []
    for _ in range(rounds):
        session.length, inside[0] = length, 0.0
        begin = time.perf_counter()
        session.period(plan, most)
        periods.append(time.perf_counter() - begin)
        shares.append(1 - inside[0] / periods[-1])
    backend.run = run  # type: ignore[method-assign]
    session.length = length
    return statistics.median(periods) * 1e3, statistics.median(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--verify", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if kernels() is None:
        parser.exit(1, "the CPU kernels are not to be had here: see the warning above\n")
    with torch.inference_mode():
        model = random_llama(args.layers)
        programs = Programs(model, args.context)
        first = programs.session("griffin", 0.5)
        steps = [
            Step("dense, kernels", lambda: one_step(first, "full")),
            Step("dense, torch reference", lambda: one_step(first, "full"), references),
            Step("dense, transformers eager", transformers_step(model, args.context)),
        ]
        for skipped in SKIPPED:
            griffin = programs.session("griffin", 1 - skipped)
            topk, cats = (programs.session("topk", 1 - skipped) for _ in range(2))
            cats_of(cats, skipped)
            named = {"griffin": griffin, "topk": topk, "cats": cats}
            steps += [
                Step(f"{name}, {skipped:.0%} skipped", lambda s=session: one_step(s, "sparse"))
                for name, session in named.items()
            ]
        for tokens in args.verify:
            steps += [
                Step(f"verify {tokens}, {side}", lambda n=tokens: verify(first, n), within)
                for side, within in (("kernels", nullcontext), ("torch reference", references))
            ]
        for turn in range(args.rounds + 1):
            for step in steps:
                step.time()
                if turn == 0:  # pays for allocation
                    step.seconds.clear()
        hosts: dict[int, tuple[float, float]] = {}
        for size in (4, 8, 16):
            hosts[size] = host_share(first, Plan(size, 1, threshold=0.0), args.rounds)
    size = sum(parameter.numel() for parameter in model.parameters()) * 2
    print(
        f"{args.layers} layers ({size / 1e9:.2f} GB), context {args.context}, bfloat16; torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads, {cpu_name()}; {args.rounds} "
        "rounds\n"
    )
    print("| step | ms | of dense | fastest ms | of dense |\n|---|---|---|---|---|")
    for step in steps:
        cells = [step.name]
        for best in (statistics.median, min):
            cells += [f"{best(step.seconds) * 1e3:.1f}"]
            cells += [f"{best(step.seconds) / best(steps[0].seconds):.2f}"]
        print("| " + " | ".join(cells) + " |")
    print("\n| period (griffin, 50% skipped) | ms | outside of entries |\n|---|---|---|")
    for size, (milliseconds, share) in hosts.items():
        print(f"| {size} tokens | {milliseconds:.1f} | {share:.2%} |")


if __name__ == "__main__":
    main()
