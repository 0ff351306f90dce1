"""Compares a device's tokens and operators with the references on the CPU.

    python -m benchmarks.gpu_check --device cuda

The shipped model generates in float32, and its tokens must be those of the CPU. Then every
`sirius::` operator runs on the device, with its kernel there, and its plain-PyTorch reference runs
on the CPU in float32 over the same values. The error is the largest ‖found − wanted‖ / ‖wanted‖ of
an output. Its bound depends on the dtype: float32 is summed in another order, bfloat16 and float16
are rounded in between. The exit code is 1 if anything differs.

Operators of nested weights, with both planes and with the high one, are compared at small widths
and at Qwen2.5-1.5B's. Their activations are rounded to integers, and random scores have ties, so
that `sirius_compile.operator_check` compares them and derives the bound of each call.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_programs import METHODS
from benchmarks.steps import replay_on
from sirius_compile import CompileConfig, compile_model
from sirius_compile.operator_check import Difference, compare, tolerance
from sirius_compile.product import Compiled
from sirius_compile.shipped.problems import Task, problems
from sirius_runtime.artifact import Artifact
from sirius_runtime.backends.cuda_graph import Recordings
from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.backends.tiered import analyse, settle_from_host
from sirius_runtime.command_line import finish
from sirius_runtime.model import SiriusModel
from sirius_runtime.nested import nest
from sirius_runtime.ops import attention, linear, mlp, moe
from sirius_runtime.spec import Layout, Method
from sirius_runtime.tiers.placement import least_room, place

BOUNDS = {dtype: tolerance(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)}
"""Bounds of the error by dtype: what rounding may cause (see `sirius_compile.operator_check`)."""
SHAPES = [
    *((1, 1, 32), (3, 4, 64), (1, 16, 256)),
    *((1, 1, 512), (2, 1, 256), (1, 61, 128), (3, 64, 96)),
]
"""Rows, tokens of a row and width, which determine each operator's sizes."""
NESTED_SHAPES = [(1, 1, 64, 192), (2, 5, 96, 320), (1, 1, 1536, 8960), (1, 8, 1536, 8960)]
"""Rows, tokens, hidden width and neurons; at the last two, the widths of Qwen2.5-1.5B."""
PLANES = {"both planes": 2, "high plane": 1}
RECORDED = "recorded"
STREAMED = "streamed"
NEW = 48

sirius = torch.ops.sirius


@dataclass(frozen=True)
class Case:
    """An operator, its reference, and arguments on the CPU."""

    name: str
    reference: Callable[..., Any]
    arguments: Sequence[Any]
    written: tuple[int, ...] = ()
    """Indices of the arguments that it writes, which count as outputs."""

    def difference(self, device: torch.device) -> Difference:
        """Between the device's outputs and the reference's, and what is allowed."""
        dtype = next(a.dtype for a in self.arguments if isinstance(a, Tensor))
        return Difference(self.error(device), BOUNDS[dtype])

    def outputs(self, function: Callable[..., Any], arguments: list[Any]) -> list[Tensor]:
        result = function(*arguments)
        values = list(result) if isinstance(result, tuple | list) else [result]
        return values + [arguments[index] for index in self.written]

    def error(self, device: torch.device) -> float:
        """The largest error of an output; infinite if the device gives NaN."""
        wide = [_mapped(value, _widened) for value in self.arguments]
        given = _on(device, self.arguments)
        wanted = self.outputs(self.reference, wide)
        found = self.outputs(getattr(sirius, self.name), given)
        return max(map(_error, found, wanted))


@dataclass(frozen=True)
class NestedCase:
    """An operator with nested weights, and arguments on the CPU."""

    operator: str
    name: str
    arguments: Sequence[Any]

    def difference(self, device: torch.device) -> Difference:
        """Between the device's outputs and the reference's on the CPU, and what is allowed."""
        operator = getattr(sirius, self.operator)
        found = operator(*_on(device, self.arguments))
        return compare(operator, self.arguments, _mapped(found, Tensor.cpu))


def _on(device: torch.device, arguments: Sequence[Any]) -> list[Any]:
    return [_mapped(value, lambda t: t.to(device, copy=True)) for value in arguments]


def _error(found: Tensor, wanted: Tensor) -> float:
    wide = wanted.double()
    wrong = (found.cpu().double() - wide).norm()
    error = float(wrong / wide.norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list | tuple):
        return [_mapped(element, function) for element in value]
    return function(value) if isinstance(value, Tensor) else value


def _widened(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value.clone()


def _random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype)


def linear_cases(dtype: torch.dtype, rows: int, tokens: int, width: int) -> Iterator[Case]:
    outputs = 3 * width // 2 + 1
    x = _random(rows, tokens, width, dtype=dtype)
    weight = _random(width, outputs, dtype=dtype, scale=width**-0.5)
    bias = _random(outputs, dtype=dtype)
    yield Case("linear", linear.linear, [x, weight.t().contiguous(), bias])
    yield Case("linear", linear.linear, [x, weight.t(), None])
    sizes = (width, outputs, width // 4, 1)
    few = [_random(n, width, dtype=dtype, scale=width**-0.5) for n in sizes]
    some = [bias[:n] if n > 1 else None for n in sizes]
    yield Case("linears", linear.linears, [x, few[:3], [None] * 3])
    yield Case("linears", linear.linears, [x, few, some])
    # Scores are multiples of 1/8, and the threshold lies between two, so rounding can't matter.
    x = (x.float() * 4).round().div(4).to(dtype)
    threshold = 0.5 + 1 / 64
    yield Case("sparse_linear", linear.sparse_linear, [x, weight, bias, threshold])
    yield Case("sparse_linear", linear.sparse_linear, [x, weight, None, threshold])


def mlp_cases(dtype: torch.dtype, rows: int, tokens: int, width: int) -> Iterator[Case]:
    neurons = 3 * width
    # One-hot tokens, and gates that are different bfloat16 numbers: activations by ReLU are exact,
    # no two are equal, and no rounding decides.
    chooses = tokens & (tokens - 1) == 0  # sums of so many equal numbers are exact too
    column = torch.randint(width, (rows, 1 if chooses else tokens)).expand(rows, tokens)
    x = torch.nn.functional.one_hot(column, width).to(dtype)
    first = torch.tensor(2.0**-8, dtype=torch.bfloat16).view(torch.int16)
    different = (first + torch.arange(neurons, dtype=torch.int16)).view(torch.bfloat16)
    order = torch.stack([torch.randperm(neurons) for _ in range(width)], 1)
    gate = different[order].to(dtype)
    up, down = (_random(neurons, width, dtype=dtype) for _ in range(2))
    biases = [None, _random(neurons, dtype=dtype), _random(width, dtype=dtype)]
    keep, layer = neurons // 2, 1
    chosen = torch.stack([torch.randperm(neurons)[:keep].sort().values for _ in range(rows)])
    choice = torch.stack([chosen, chosen])
    valid = torch.rand(rows, tokens) < 0.7
    for weights in ([gate, up, down, *biases], [gate, None, down, None, None, None]):
        for act in ("silu", "gelu_tanh"):
            args = [x, *weights, act, layer]
            yield Case("dense_mlp", mlp.dense_mlp, args)
            yield Case("griffin_mlp", mlp.griffin_mlp, [*args, choice])
        args = [x, *weights, "relu", layer]
        yield Case("dense_mlp_statistic", mlp.dense_mlp_statistic, [*args, valid])
        yield Case("dense_mlp_activity", mlp.dense_mlp_activity, args)
        if chooses:
            yield Case("topk_mlp", mlp.topk_mlp, [*args, neurons // 4])
            threshold = float(different[neurons // 2])
            yield Case("cats_mlp", mlp.cats_mlp, [*args, threshold])
            yield Case("griffin_cats_mlp", mlp.griffin_cats_mlp, [*args, choice, threshold])


def moe_cases(dtype: torch.dtype, rows: int, tokens: int, width: int) -> Iterator[Case]:
    count, experts, routed, neurons = rows * tokens, 6, 2, 2 * width
    x = _random(count, width, dtype=dtype)
    weights, chosen = torch.randn(count, experts).softmax(-1).topk(routed)
    gate, up, down = (
        _random(experts, neurons, width, dtype=dtype, scale=width**-0.5) for _ in range(3)
    )
    args = [x, chosen, weights.to(dtype), gate, up, down, None, None, None, "silu", 0]
    yield Case("dense_moe", moe.dense_moe, args)
    yield Case("experts_moe", moe.experts_moe, [*args, 1, True])


def attention_cases(dtype: torch.dtype, rows: int, tokens: int, width: int) -> Iterator[Case]:
    heads, groups, head, slots, layers, layer = 8, 2, width // 4, 3 * tokens + 200, 2, 1
    q = _random(rows, heads, tokens, head, dtype=dtype)
    k, v = (_random(rows, groups, tokens, head, dtype=dtype) for _ in range(2))
    caches = [_random(layers, rows, groups, slots, head, dtype=dtype) for _ in range(2)]
    blocks = [_random(layers, rows, groups, tokens, head, dtype=dtype) for _ in range(2)]
    length = torch.tensor([150, 37, 0][:rows])
    index = torch.arange(tokens)
    chain = (index[:, None] - index).clamp(min=-1)[None]
    at = length[:, None] + index
    for window, softcap in ((None, None), (24, 30.0)):
        rest = [layer, head**-0.5, window, softcap]
        yield Case(
            "cached_attention",
            attention.cached_attention,
            [q, k, v, *caches, at, at, length, chain, *rest],
            written=(3, 4),
        )
        yield Case(
            "block_attention",
            attention.block_attention,
            [q, k, v, *caches, *blocks, at, index, length, chain, *rest],
        )
        yield Case("attention", attention.attention, [q, k, v, *rest])


KINDS = (linear_cases, mlp_cases, moe_cases, attention_cases)


def _cases(
    kinds: Sequence[Callable[..., Iterator[Case | NestedCase]]],
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, ...]],
) -> Iterator[Case | NestedCase]:
    for shape in shapes:
        for kind in kinds:
            yield from kind(dtype, *shape)


def nested_cases(
    dtype: torch.dtype, rows: int, tokens: int, width: int, neurons: int
) -> Iterator[NestedCase]:
    """Linears, embeddings and MLPs, each with both planes and with the high one."""
    x = _random(rows, tokens, width, dtype=dtype)

    def nested(outputs: int, inputs: int, layout: Layout) -> Tensor:
        return nest(torch.randn(outputs, inputs) * inputs**-0.5, layout)

    few = [nested(n, width, Layout.BY_OUTPUTS) for n in (width, width // 4, width // 4)]
    across = nested(width, width, Layout.BY_INPUTS)
    gate, up = (nested(neurons, width, Layout.BY_OUTPUTS) for _ in range(2))
    down = nested(width, neurons, Layout.BY_INPUTS)
    bias = _random(width, dtype=dtype)
    biases = [_random(neurons, dtype=dtype), None, bias]
    layer, keep = 1, neurons // 2
    choice = torch.randn(2, rows, neurons).argsort(-1)[..., :keep]
    ids = torch.randint(width, (rows, tokens))
    # The share of neurons above a threshold on |act(gate x)| changes with gate's scale, so that it
    # is taken from the scores: half of them.
    score = mlp.neuron_scores(x, gate, up, down, *biases, "silu", layer)
    threshold = score.float().median().item()
    for title, planes in PLANES.items():

        def case(operator: str, *arguments: Any, title: str = title) -> NestedCase:
            return NestedCase(operator, f"{operator}, {title}", arguments)

        wide = [weight[:planes] for weight in (gate, up, down)]
        yield case("linear", x, few[0][:planes], bias)
        yield case("linear", x, across[:planes], None)
        yield case("linears", x, [weight[:planes] for weight in few], [bias, None, None])
        yield case("embedding", few[0][:planes], ids, dtype)
        yield case("sparse_linear", x, across[:planes], bias, 0.7)
        args = [x, *wide, *biases, "silu", layer]
        yield case("dense_mlp", *args)
        yield case("topk_mlp", *args, keep)
        yield case("cats_mlp", *args, threshold)
        yield case("griffin_mlp", *args, choice)
        yield case("griffin_cats_mlp", *args, choice, threshold)


def operator_rows(
    device: torch.device, dtype: torch.dtype, cases: Iterable[Case | NestedCase]
) -> Iterator[tuple[str, bool]]:
    """The table's lines and whether each holds: for each operator, the call nearest its bound."""
    worst: dict[str, tuple[Difference, int]] = {}
    for case in cases:
        one = case.difference(device)
        before, count = worst.get(case.name, (one, 0))
        worst[case.name] = max(before, one, key=lambda d: d.error / d.allowed), count + 1
    for name, (most, count) in sorted(worst.items()):
        cells = [name, str(dtype).removeprefix("torch."), str(count)]
        cells += [f"{most.error:.1e}", f"{most.allowed:.0e}", _said(most.right)]
        yield "| " + " | ".join(cells) + " |", most.right


def behind(backend: str, compiled: Compiled, device: torch.device) -> SiriusModel:
    """`recorded`: like `cudagraph` without inductor; on the CPU, the same work unrecorded.
    `streamed`: with as few weights on the device as work, the others in the host's memory.
    """
    if backend == STREAMED:
        return streamed(compiled, device)
    if backend != RECORDED:
        return compiled.to_runtime(device=device, backend=backend)
    model = compiled.to_runtime(device=device)
    assert isinstance(model.backend, EagerBackend)
    own = copy.copy(model.backend)
    own.open = Recordings(own, lambda: replay_on(device)).open  # type: ignore[method-assign]
    return SiriusModel(own, model.tokenizer)


def streamed(compiled: Compiled, device: torch.device) -> SiriusModel:
    with tempfile.TemporaryDirectory() as folder:
        path = compiled.save(Path(folder) / "model.sirius")
        with Artifact.open(path) as artifact:
            own = analyse(artifact, device)
            settle_from_host(own, artifact, place(own.needs, least_room(own.needs)))
            return SiriusModel(own, compiled.tokenizer())


def token_rows(
    device: torch.device, methods: Sequence[Method], backends: Sequence[str]
) -> Iterator[tuple[str, bool]]:
    """The table's lines and whether each holds: a sparse path behind a back end."""
    source = problems(Task.REASONING, "test", seed=11)
    prompts = [next(source).prompt for _ in range(2)]
    for method in methods:
        config = CompileConfig(
            sparsity=method, keep=0.5, period=8, dtype="float32", graphs="entries"
        )
        compiled = compile_model("tally-3m", config)
        wanted = compiled.to_runtime(device="cpu")
        for backend in backends:
            found, same, count = behind(backend, compiled, device), 0, 0
            for mode in ("sirius", "exact", "full"):
                for width in (1, 4):
                    options: dict[str, Any] = {"mode": mode, "max_new_tokens": NEW}
                    options["tree_width"] = width
                    pair = [m.generate(prompts, **options).tokens for m in (wanted, found)]
                    same += pair[0] == pair[1]
                    count += 1
            holds = same == count
            yield f"| {method} | {backend} | {same} of {count} | {_said(holds)} |", holds


def _said(holds: bool) -> str:
    return "ok" if holds else "WRONG"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--smoke", action="store_true", help="two shapes, one method")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    torch.manual_seed(0)
    few = 1 if args.smoke else len(METHODS)
    methods, shapes = METHODS[:few], SHAPES[: 2 * few]
    nested_shapes = NESTED_SHAPES[: 2 * few]
    held = True

    def show(rows: Iterator[tuple[str, bool]]) -> None:
        nonlocal held
        for row, holds in rows:
            print(row, flush=True)
            held &= holds

    print("| tally-3m, float32 | back end | runs with the CPU's tokens | |\n|" + "---|" * 4)
    show(token_rows(device, methods, ("eager", RECORDED)))
    show(token_rows(device, methods[:1], (STREAMED,)))
    if device.type == "cuda":
        show(token_rows(device, methods[-1:], ("cudagraph",)))  # a minute of compiling each
    print("\n| operator | dtype | calls | largest error | bound | |\n|" + "---|" * 6)
    with torch.inference_mode():
        for dtype in BOUNDS:
            # Each dtype is another compilation of each kernel.
            own = shapes if dtype is torch.bfloat16 else shapes[:3]
            show(operator_rows(device, dtype, _cases(KINDS, dtype, own)))
        for dtype in BOUNDS:
            own = nested_shapes if dtype is torch.bfloat16 else nested_shapes[:2]
            show(operator_rows(device, dtype, _cases((nested_cases,), dtype, own)))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    sys.exit(finish("benchmarks.gpu_check", main))
