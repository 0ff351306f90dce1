"""Compares ways to skip neurons and experts with standard ONNX operators.

    python -m benchmarks.onnx_formulations

One MLP of one token on the CPU, float32, at Llama-3.2-1B's shapes, by each method's rule and in
each form: everything computed and masked, kept rows gathered each step, and for griffin gathered
once per prompt. Weights are random; the thresholds of cats and teal keep the requested share on
this token. The second table is a mixture: all experts computed, a token's experts gathered, and
each expert's product over the rows routed to it. Times are medians of one interleaved run. Each
form's result is compared with its rule's reference operator first (`benchmarks.checked`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from benchmarks import checked
from sirius_compile.onnx import emit as e
from sirius_compile.onnx.lower import make_model
from sirius_compile.onnx.mlp import activation, sparse_linear, topk
from sirius_compile.onnx.moe import dense_moe
from sirius_compile.onnx.scope import Scope, Value, value_info
from sirius_runtime.command_line import finish, threads_argument
from sirius_runtime.ops import mlp, moe
from sirius_runtime.ops.linear import sparse_linear as sparse_reference

C, I = 2048, 8192  # noqa: E741
E, K, J = 16, 2, 1792  # experts, experts of a token, neurons of an expert

Way = Callable[[Scope, Value], Value]


@dataclass(frozen=True)
class Form:
    """A way to compute something, and the reference operator's result on the same values."""

    way: Way
    wanted: Callable[[], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=threads_argument, default=1)
    formulations(parser.parse_args().threads)


def formulations(threads: int, repeats: int = 15) -> None:
    """Prints both tables."""
    print(f"| MLP {C} x {I}, one token | kept | ms | of all neurons |\n|---|---|---|---|")
    for keep in (0.5, 0.3, 0.1):
        show(
            {"all neurons": Form(dense, dense_reference)} | ways(keep),
            f"{keep:g}",
            threads,
            repeats,
        )
    print(f"\n| {E} experts of {J} neurons, one token | experts | ms | of all experts |")
    print("|---|---|---|---|")
    mixture = {
        "all experts": Form(all_experts, mixture_reference),
        "a token's own, gathered each step": Form(gathered_experts, mixture_reference),
        "a token's own, in place": Form(own_experts, mixture_reference),
    }
    show(mixture, f"{K} of {E}", threads, repeats)


def show(forms: dict[str, Form], kept: str, threads: int, repeats: int) -> None:
    calls = {name: built(form.way, threads) for name, form in forms.items()}
    for name, form in forms.items():
        checked.near(f"{name}, {kept}", torch.from_numpy(calls[name]()), form.wanted())
    seconds = measured(calls, repeats)
    base, *_ = seconds.values()
    for name, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
        print(f"| {name} | {kept} | {statistics.median(own) * 1e3:.2f} | {ratio:.2f} |", flush=True)


# MLPs


def ways(keep: float) -> dict[str, Form]:
    count = round(keep * I)
    # Quantiles of this token's |act(gate x)| and |x|, which depend on the weights' seed.
    activity, channels = threshold(gated, keep), threshold(lambda s, x: x, keep)
    hidden = threshold(lambda s, x: hidden_of(s, x), keep)
    teal = {"outer": channels, "inner": hidden}
    return {
        "griffin, gathered once a prompt": Form(
            partial(gathered_once, count=count), partial(gathered_once_reference, count)
        ),
        "griffin, gathered each step": Form(
            partial(gathered_by_index, count=count), partial(griffin_reference, count)
        ),
        "topk, masked": Form(partial(masked, count=count), partial(topk_reference, count)),
        "topk, gathered each step": Form(
            partial(gathered_each_step, count=count), partial(topk_reference, count)
        ),
        "cats, masked": Form(
            partial(masked_above, threshold=activity), partial(cats_reference, activity)
        ),
        "cats, gathered each step": Form(
            partial(gathered_above, threshold=activity), partial(cats_reference, activity)
        ),
        "teal, masked": Form(partial(inputs_masked, **teal), partial(teal_reference, **teal)),
        "teal, gathered each step": Form(
            partial(inputs_gathered, **teal), partial(teal_reference, **teal)
        ),
    }


# The reference operators' results, each [1, C]


def tensor(name: str, *shape: int) -> torch.Tensor:
    return torch.from_numpy(value_of(name, shape))


def mlp_arguments() -> tuple[Any, ...]:
    """x [1, 1, C], the weights, no biases, the activation and the layer."""
    matrices = (tensor(name, I, C) for name in ("gate", "up", "down"))
    return tensor("x", 1, C)[None], *matrices, None, None, None, "silu", 0


def dense_reference() -> torch.Tensor:
    return mlp.dense_mlp(*mlp_arguments())[0]


def griffin_reference(count: int) -> torch.Tensor:
    return mlp.griffin_mlp(*mlp_arguments(), tensor("neurons", count)[None, None])[0]


def gathered_once_reference(count: int) -> torch.Tensor:
    """The reference for griffin: the gathered neurons have their own copy of the weights here."""
    gate, up = (tensor(f"{name}_kept", C, count).t() for name in ("gate", "up"))
    x, _gate, _up, _down, *rest = mlp_arguments()
    return mlp.dense_mlp(x, gate, up, tensor("down_kept", count, C), *rest)[0]


def topk_reference(count: int) -> torch.Tensor:
    return mlp.topk_mlp(*mlp_arguments(), count)[0]


def cats_reference(threshold: float) -> torch.Tensor:
    return mlp.cats_mlp(*mlp_arguments(), threshold)[0][0]


def teal_reference(outer: float, inner: float) -> torch.Tensor:
    x, gate, up, down, *_ = mlp_arguments()
    g, u = (sparse_reference(x, w.t(), None, outer)[0] for w in (gate, up))
    z = torch.nn.functional.silu(g) * u
    return sparse_reference(z, down, None, inner)[0][0]


def mixture_reference() -> torch.Tensor:
    gate, down = (tensor(name, E, J, C) for name in ("gates", "downs"))
    index, shares = tensor("experts", 1, K), tensor("shares", 1, K)
    mlps = gate, None, down, None, None, None
    return moe.dense_moe(tensor("x", 1, C), index, shares, *mlps, "silu", 0)


def weights(s: Scope) -> tuple[Value, Value, Value]:
    gate, up, down = (s.weight(name, "float32", (I, C)) for name in ("gate", "up", "down"))
    return gate, up, down


def gated(s: Scope, x: Value) -> Value:
    return activation(s, e.linear(s, x, weights(s)[0], None), "silu")


def hidden_of(s: Scope, x: Value) -> Value:
    return e.elementwise(s, "Mul", gated(s, x), e.linear(s, x, weights(s)[1], None))


def dense(s: Scope, x: Value) -> Value:
    return e.flat_matmul(s, hidden_of(s, x), weights(s)[2])


def gathered_once(s: Scope, x: Value, count: int) -> Value:
    gate, up = (s.input(f"{name}_kept", "float32", (C, count)) for name in ("gate", "up"))
    down = s.input("down_kept", "float32", (count, C))
    z = e.elementwise(s, "Mul", activation(s, e.matmul(s, x, gate), "silu"), e.matmul(s, x, up))
    return e.matmul(s, z, down)


def gathered_by_index(s: Scope, x: Value, count: int) -> Value:
    neurons = s.input("neurons", "int64", (count,))
    gate, up, down = (e.gather(s, w, neurons, 0) for w in weights(s))
    g = activation(s, by_rows(s, x, gate), "silu")
    return e.matmul(s, e.elementwise(s, "Mul", g, by_rows(s, x, up)), down)


def by_rows(s: Scope, x: Value, rows: Value) -> Value:
    return s.op("Gemm", x, rows, shape=(1, rows.shape[0]), transB=1)


def masked(s: Scope, x: Value, count: int) -> Value:
    g = gated(s, x)
    _, index = topk(s, s.op("Abs", g, shape=g.shape), count)
    ones, none = e.filled(s, [1, count], 1.0, "float32"), e.filled(s, [1, I], 0.0, "float32")
    kept = s.op("ScatterElements", none, index, ones, shape=(1, I), axis=1)
    return with_up_and_down(s, x, e.elementwise(s, "Mul", g, kept))


def with_up_and_down(s: Scope, x: Value, g: Value) -> Value:
    z = e.elementwise(s, "Mul", g, e.linear(s, x, weights(s)[1], None))
    return e.flat_matmul(s, z, weights(s)[2])


def gathered_each_step(s: Scope, x: Value, count: int) -> Value:
    g = gated(s, x)
    _, index = topk(s, s.op("Abs", g, shape=g.shape), count)
    return over_rows(s, x, g, e.reshape(s, index, [count]))


def over_rows(s: Scope, x: Value, g: Value, index: Value) -> Value:
    """The MLP over only these rows of up and down."""
    _, up, down = weights(s)
    y = by_rows(s, x, e.gather(s, up, index, 0))
    z = e.elementwise(s, "Mul", e.gather(s, g, index, 1), y)
    return e.matmul(s, z, e.gather(s, down, index, 0))


def masked_above(s: Scope, x: Value, threshold: float) -> Value:
    g = gated(s, x)
    return with_up_and_down(s, x, e.elementwise(s, "Mul", g, above(s, g, threshold)))


def gathered_above(s: Scope, x: Value, threshold: float) -> Value:
    g = gated(s, x)
    return over_rows(s, x, g, places(s, g, threshold))


def above(s: Scope, x: Value, threshold: float) -> Value:
    size = s.op("Abs", x, shape=x.shape)
    return e.elementwise(s, "Greater", size, threshold, result="bool")


def places(s: Scope, x: Value, threshold: float) -> Value:
    """The indices of the values above the threshold."""
    found = s.op("NonZero", above(s, x, threshold), shape=(2, None), dtype="int64")
    return e.gather(s, found, s.constant(1, "int64"), 0)


def inputs_masked(s: Scope, x: Value, outer: float, inner: float) -> Value:
    """Weights are stored [in, out], as teal's are."""
    x, gate, up, down = as_teal(s, x)
    g, u = (sparse_linear(s, x, w, None, outer)[0] for w in (gate, up))
    z = e.elementwise(s, "Mul", activation(s, g, "silu"), u)
    return e.squeeze(s, sparse_linear(s, z, down, None, inner)[0], 0)


def as_teal(s: Scope, x: Value) -> tuple[Value, Value, Value, Value]:
    gate, up = (s.weight(f"{name}_turned", "float32", (C, I)) for name in ("gate", "up"))
    return e.unsqueeze(s, x, 0), gate, up, weights(s)[2]


def inputs_gathered(s: Scope, x: Value, outer: float, inner: float) -> Value:
    _, gate, up, down = as_teal(s, x)

    def product(x: Value, weight: Value, index: Value) -> Value:
        return e.matmul(s, e.gather(s, x, index, 1), e.gather(s, weight, index, 0))

    index = places(s, x, outer)
    z = e.elementwise(
        s, "Mul", activation(s, product(x, gate, index), "silu"), product(x, up, index)
    )
    return product(z, down, places(s, z, inner))


# mixtures: gate alone, and down


def experts(s: Scope) -> tuple[Value, Value]:
    return s.weight("gates", "float32", (E, J, C)), s.weight("downs", "float32", (E, J, C))


def routed(s: Scope) -> tuple[Value, Value]:
    return s.input("experts", "int64", (1, K)), s.input("shares", "float32", (1, K))


def own_experts(s: Scope, x: Value) -> Value:
    gate, down = experts(s)
    return dense_moe(s, x, *routed(s), gate, None, down, None, None, None, "silu", 0)


def gathered_experts(s: Scope, x: Value) -> Value:
    index, shares = routed(s)
    own, down = (e.gather(s, w, e.reshape(s, index, [K]), 0) for w in experts(s))
    g = activation(s, e.matmul(s, e.unsqueeze(s, x, 0), e.swap(s, own, 1, 2)), "silu")
    return weighted(s, e.matmul(s, g, down), shares)


def all_experts(s: Scope, x: Value) -> Value:
    index, shares = routed(s)
    gate, down = (s.weight(name, "float32", shape) for name, shape in ALL)
    g = e.reshape(s, activation(s, by_rows(s, x, gate), "silu"), [E, 1, J])
    y = e.gather(s, e.matmul(s, g, down), e.reshape(s, index, [K]), 0)
    return weighted(s, y, shares)


ALL: tuple[tuple[str, tuple[int, ...]], ...] = (("gates_flat", (E * J, C)), ("downs", (E, J, C)))


def weighted(s: Scope, y: Value, shares: Value) -> Value:
    """The weighted sum of the experts' outputs y [K, 1, C]."""
    share = e.reshape(s, shares, [K, 1, 1])
    return e.reduced(s, "ReduceSum", e.elementwise(s, "Mul", y, share), [0], False)


# running them


def value_of(name: str, shape: Sequence[int]) -> np.ndarray:
    """A weight or an input; one name gives the same value each time."""
    if name.endswith("_turned"):
        return np.ascontiguousarray(value_of(name.removesuffix("_turned"), shape[::-1]).T)
    if "[" in name:
        whole, _, index = name.rstrip("]").partition("[")
        return value_of(whole, (E, *shape))[int(index)]
    if name.endswith("_flat"):
        return value_of(name.removesuffix("_flat"), (E, J, C)).reshape(shape)
    if name not in VALUES:
        generator = np.random.default_rng(len(VALUES))
        if name == "neurons":
            return np.sort(np.random.default_rng(shape[0]).permutation(I)[: shape[0]])
        if name == "experts":
            return np.arange(K)[None] * (E // K) + 1
        if "_kept" in name:
            kept = np.random.default_rng(sum(map(ord, name)))
            return kept.standard_normal(tuple(shape), np.float32)
        array = generator.standard_normal(tuple(shape), np.float32)
        VALUES[name] = array if name == "x" else array * C**-0.5
    return VALUES[name]


VALUES: dict[str, np.ndarray] = {}


def threshold(way: Way, keep: float) -> float:
    """The threshold above which a share `keep` of the |values| of `way` lie."""
    values = np.abs(built(way, 1)())
    return float(np.quantile(values, 1 - keep))


def built(way: Way, threads: int) -> Callable[[], np.ndarray]:
    """One call of the graph that `way` makes."""
    s = Scope()
    y = s.returned(way(s, s.input("x", "float32", (1, C))), "y")
    model = make_model(s.graph("mlp", [value_info(y)]))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.disable_prepacking", "1")
    held: list[Any] = []
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            array = value_of(tensor.name, tuple(tensor.dims))
            for key, value in (("location", "w"), ("offset", "0"), ("length", str(array.nbytes))):
                tensor.external_data.add(key=key, value=value)
            held.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
            options.add_initializer(tensor.name, held[-1])
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "w").touch()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", scratch
        )
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    given = {i.name: value_of(i.name, i.shape) for i in session.get_inputs()}

    def call(held: list[Any] = held) -> np.ndarray:  # which the session does not keep alive
        return session.run(None, given)[0]

    return call


def measured(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if repeat >= 2:
                taken[name].append(time.perf_counter() - begin)
    return taken


if __name__ == "__main__":
    sys.exit(finish("benchmarks.onnx_formulations", main))
