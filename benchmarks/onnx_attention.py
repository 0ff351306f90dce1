"""ONNX's operator Attention compared with our lowering of attention, one layer, on the CPU.

    python -m benchmarks.onnx_attention            # the table, in seconds

Queries of T tokens see E committed slots of a cache, and the nodes of their block of M that a tree
mask allows. `whole`: the cache as stored, [layers, B, G, S, D], as in verification or one step. `in
the loop`: the committed slots are sliced out before, as the graph `period` does once for all of its
steps. Attention takes these as past keys and values, and concatenates the block's; `joined before`
is a lower bound, for a cache that already contains the block. Times are medians of one interleaved
run; a ratio below 1 means that the operator is faster. All are compared with the reference operator
first; `difference` is the largest (`benchmarks.checked`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper

from benchmarks import checked
from sirius_compile.onnx import attention
from sirius_compile.onnx import emit as e
from sirius_compile.onnx.lower import make_model
from sirius_compile.onnx.scope import Scope, Value, value_info
from sirius_runtime.command_line import finish, positive_number, threads_argument
from sirius_runtime.ops.attention import cached_attention
from sirius_runtime.ops.operands import Attention, Heads, Places

OPSET, IR_VERSION = 23, 11  # the first with Attention
H, G, D, S = 8, 2, 64, 4608
DTYPE = "float32"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=threads_argument, default=1)
    parser.add_argument("--repeats", type=positive_number, default=60)
    args = parser.parse_args(arguments)
    print(
        f"onnxruntime {onnxruntime.__version__}, opset {OPSET}, {args.threads} threads, {DTYPE}, "
        f"{H} heads, {G} key/value heads of {D}\n"
    )
    print("| E | T | M | form | ours, ms | Attention / ours | joined before / ours | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for E in (512, 4096):
        for T, M in ((1, 1), (1, 16), (16, 16)):
            for form in ("whole", "in the loop"):
                print(row(E, T, M, form, args), flush=True)


def row(E: int, T: int, M: int, form: str, args: argparse.Namespace) -> str:
    given = inputs(E, T, M)
    calls = {
        name: opened(make(T, M, form), args.threads, given)
        for name, make in (("ours", ours), ("Attention", standard), ("joined", joined))
    }
    wanted = reference(given, T)
    found = {name: torch.from_numpy(call()) for name, call in calls.items()}
    for name, y in found.items():
        checked.near(f"{name}, E {E}, T {T}, M {M}, {form}", y, wanted)
    difference = max(float((y - wanted).abs().max()) for y in found.values())
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(args.repeats + 3):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if repeat >= 3:
                taken[name].append(time.perf_counter() - begin)
    own, *others = taken.values()
    ratios = [statistics.median(b / a for a, b in zip(own, other, strict=True)) for other in others]
    shown = [f"{statistics.median(own) * 1e3:.3f}", *(f"{ratio:.2f}" for ratio in ratios)]
    return f"| {E} | {T} | {M} | {form} | {' | '.join(shown)} | {difference:.1e} |"


def inputs(E: int, T: int, M: int) -> dict[str, np.ndarray]:
    """A block of which every third node is hidden from the others, after a history of E slots."""
    generator = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, np.float32)

    index = np.arange(M)
    depth = np.where((index % 3 == 2) & (index != index[:, None]), -1, index[:, None] - index)
    past_k, past_v = random(1, G, E, D), random(1, G, E, D)
    k_cache, v_cache = random(1, 1, G, S, D), random(1, 1, G, S, D)
    k, v = random(1, G, M, D), random(1, G, M, D)
    k_cache[0, :, :, :E], v_cache[0, :, :, :E] = past_k, past_v
    return {
        "q": random(1, H, T, D),
        "k": k,
        "v": v,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "past_k": past_k,
        "past_k_turned": np.ascontiguousarray(past_k.swapaxes(2, 3)),
        "past_v": past_v,
        "joined_k": np.concatenate([past_k, k], 2),
        "joined_v": np.concatenate([past_v, v], 2),
        "positions": np.arange(E, E + T)[None],
        "length": np.array([E]),
        "tree_mask": np.maximum(depth, -1)[None, M - T :],
    }


def reference(given: dict[str, np.ndarray], T: int) -> torch.Tensor:
    """The reference in PyTorch for the block's last T nodes; the others are in the cache."""
    tensors = {name: torch.from_numpy(value.copy()) for name, value in given.items()}
    E, M = int(tensors["length"]), tensors["k"].shape[2]
    caches = tensors["k_cache"], tensors["v_cache"]
    for cache, new in zip(caches, (tensors["k"], tensors["v"]), strict=True):
        cache[0, :, :, E : E + M] = new
    return cached_attention(
        tensors["q"],
        *(tensors[name][:, :, M - T :] for name in "kv"),
        *caches,
        tensors["positions"],
        torch.arange(E + M - T, E + M)[None],
        tensors["length"],
        tensors["tree_mask"],
        0,
        D**-0.5,
        None,
        None,
    )


class Graph:
    """A graph under construction, and its inputs."""

    def __init__(self, T: int, M: int) -> None:
        self.s = s = Scope()
        self.q = s.input("q", DTYPE, ("B", H, T, D))
        self.k, self.v = (s.input(name, DTYPE, ("B", G, M, D)) for name in "kv")
        self.positions = s.input("positions", "int64", ("B", T))
        self.length = s.input("length", "int64", ("B",))
        mask = s.input("tree_mask", "int64", ("B", T, M))
        # No translation reads the slots, because the caller writes the cache.
        self.places = Places(self.positions, self.positions, self.length, mask)

    def caches(self) -> tuple[Value, Value]:
        shape = (1, "B", G, "S", D)
        return self.s.input("k_cache", DTYPE, shape), self.s.input("v_cache", DTYPE, shape)

    def model(self, y: Value) -> onnx.ModelProto:
        y = self.s.returned(y, "y")
        return make_model(self.s.graph("attention", [value_info(y)]))


def ours(T: int, M: int, form: str) -> onnx.ModelProto:
    g = Graph(T, M)
    if form == "whole":
        committed = attention._Committed.of(g.s, *g.caches(), g.length, 0)
    else:
        keys = g.s.input("past_k_turned", DTYPE, ("B", G, D, "E"))
        values = g.s.input("past_v", DTYPE, ("B", G, "E", D))
        committed = attention._Committed(keys, values, g.s.size("E"))
    kind: Attention[Value] = Attention(0, D**-0.5, None, None)
    y = attention._attend(g.s, Heads(g.q, g.k, g.v), committed, g.places, kind)
    return g.model(y)


def standard(T: int, M: int, form: str) -> onnx.ModelProto:
    g = Graph(T, M)
    if form == "whole":
        longest = e.reduced(g.s, "ReduceMax", g.length, [0], False)
        past = [attention._slots(g.s, cache, 0, longest) for cache in g.caches()]
    else:
        past = [g.s.input(name, DTYPE, ("B", G, "E", D)) for name in ("past_k", "past_v")]
        longest = g.s.size("E")
    return with_operator(g, g.k, g.v, longest, *past)


def joined(T: int, M: int, form: str) -> onnx.ModelProto:
    g = Graph(T, M)
    k, v = (g.s.input(name, DTYPE, ("B", G, "all", D)) for name in ("joined_k", "joined_v"))
    return with_operator(g, k, v, e.reduced(g.s, "ReduceMax", g.length, [0], False))


def with_operator(g: Graph, k: Value, v: Value, longest: Value, *past: Value) -> onnx.ModelProto:
    hidden = attention._hidden(g.s, longest, g.places, None)
    mask, kind = e.unsqueeze(g.s, hidden, 1), [(DTYPE, (None,) * 4)] * (3 if past else 1)
    y, *_ = g.s.ops("Attention", g.q, k, v, mask, *past, outputs=kind, scale=D**-0.5)
    model = g.model(y)
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(model.graph, opset_imports=opset, ir_version=IR_VERSION)


def opened(
    model: onnx.ModelProto, threads: int, given: dict[str, np.ndarray]
) -> Callable[[], np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    own = {i.name: given[i.name] for i in session.get_inputs()}
    return lambda: session.run(None, own)[0]


if __name__ == "__main__":
    sys.exit(finish("benchmarks.onnx_attention", main))
