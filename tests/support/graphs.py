"""Small programs, made by hand: a module is traced by torch.export as capture traces a model."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.insert_kv_cache import InsertKvCache
from sirius_passes.manager import Pass, run_passes
from sirius_passes.pair_paths import PairPaths
from sirius_passes.program import DENSE, OUTPUTS, Program, Stage, calls, copy_graph, subgraphs
from sirius_passes.recognise_mlps import RecogniseMlps
from sirius_passes.testing import snapshot
from sirius_runtime.dtypes import dtype_name
from sirius_runtime.graph import CAPTURE_DTYPE, INPUT, WEIGHT, from_document, to_document
from sirius_runtime.spec import StateSpec, WeightSpec
from tests.support.once import quick_traces

VOCABULARY, HIDDEN, NEURONS, POSITIONS = 11, 6, 10, 32


class Mlp(nn.Module):
    """A gated MLP; `bias` for all three of its linears."""

    def __init__(
        self,
        act: Callable[[Tensor], Tensor] = F.silu,
        *,
        bias: bool = False,
        neurons: int = NEURONS,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, neurons, bias=bias)
        self.up = nn.Linear(HIDDEN, neurons, bias=bias)
        self.down = nn.Linear(neurons, HIDDEN, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class FusedMlp(nn.Module):
    """A gated MLP whose gate and up are rows of one weight, told apart by `split`."""

    def __init__(
        self, split: Callable[[Tensor], tuple[Tensor, Tensor]], *, bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_up = nn.Linear(HIDDEN, 2 * NEURONS, bias=bias)
        self.down = nn.Linear(NEURONS, HIDDEN, bias=False)
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.split(self.gate_up(x))
        return self.down(F.silu(gate) * up)


class Plain(nn.Module):
    """An MLP of two matrices."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, NEURONS), nn.Linear(NEURONS, HIDDEN)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Mixture(nn.Module):
    """Two of three experts a token, as capture emits it: fused gate_up, and down not neuron-major.

    `normalised`: weights sum to 1, written in place as routers do.
    """

    def __init__(self, layer: int = 0, *, normalised: bool = True) -> None:
        super().__init__()
        self.layer, self.normalised = layer, normalised
        self.router = nn.Linear(HIDDEN, 3, bias=False)
        self.gate_up = nn.Parameter(torch.empty(3, 2 * NEURONS, HIDDEN))
        self.down = nn.Parameter(torch.empty(3, HIDDEN, NEURONS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        weights, experts = self.router(flat).float().softmax(-1).topk(2)
        if self.normalised:
            weights /= weights.sum(-1, keepdim=True)
        gate, up = self.gate_up[:, :NEURONS], self.gate_up[:, NEURONS:]
        mlps = gate, up, self.down.transpose(1, 2), None, None, None, "silu", self.layer
        return torch.ops.sirius.dense_moe(flat, experts, weights, *mlps).reshape(x.shape)


class Attention(nn.Module):
    """Grouped-query attention of 2 heads over 1, as capture emits it."""

    def __init__(
        self,
        layer: int,
        window: int | None = None,
        softcap: float | None = None,
        *,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.empty(2)) if sinks else None
        self.kind = layer, 0.5, window, softcap
        self.q = nn.Linear(HIDDEN, 4, bias=False)
        self.k = nn.Linear(HIDDEN, 2, bias=False)
        self.v = nn.Linear(HIDDEN, 2, bias=False)
        self.o = nn.Linear(4, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, 2)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        y = torch.ops.sirius.attention(q, k, v, *self.kind, self.sinks)
        return self.o(y.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Embeddings of tokens and positions, residual `layers`, a head: logits [B, T, V]."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.place = nn.Embedding(POSITIONS, HIDDEN)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.place(positions)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def trace(build: Callable[[], nn.Module]) -> Program:
    """The program of the module that `build` makes, at stage CAPTURED. It has no real weights."""
    return copied(_trace(build))


def copied(program: Program) -> Program:
    """A program to change: as `copy_program`, and of a period the graphs within it too."""
    graphs = {
        name: copy.deepcopy(module) if subgraphs(module) else copy_graph(module)
        for name, module in program.graphs.items()
    }
    return replace(program, graphs=graphs, weights=dict(program.weights))


@functools.cache
def _trace(build: Callable[[], nn.Module]) -> Program:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with quick_traces(), fake, torch.no_grad():
        with _default_dtype(CAPTURE_DTYPE):
            module = build().eval()
        example = {
            "input_ids": torch.zeros(2, 8, dtype=torch.int64),
            "positions": torch.arange(8).expand(2, 8).contiguous(),
        }
        sizes = {0: Dim("B", min=1, max=64), 1: Dim("T", min=1, max=64)}
        exported = torch.export.export(
            module, (), example, dynamic_shapes=dict.fromkeys(example, sizes), strict=False
        )
    graph = exported.graph_module.graph
    for node in calls(graph, torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)
    weights: dict[str, WeightSpec] = {}
    for spec in exported.graph_signature.input_specs:
        (node,) = [n for n in graph.nodes if n.name == spec.arg.name]
        if spec.target is None:
            node.meta[INPUT] = node.name
            continue
        value = node.meta["val"]
        node.meta[WEIGHT] = spec.target
        weights[spec.target] = WeightSpec(spec.target, dtype_name(value.dtype), tuple(value.shape))
    output = graph.output_node()
    output.meta[OUTPUTS] = ("logits",)
    program = Program(
        Stage.CAPTURED,
        {DENSE: fx.GraphModule(nn.Module(), graph)},
        weights,
        StateSpec(len(calls(graph, torch.ops.sirius.attention.default)), 1, 2, 2),
    )
    program.drop_unused_weights()
    return program


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def after(build: Callable[[], nn.Module], *passes: Pass) -> Program:
    """The program of the module that `build` makes, after `passes`."""
    program = trace(build)
    run_passes(program, passes)
    return program


def paired(build: Callable[[], nn.Module]) -> Program:
    """The same at stage PAIRED, its MLPs raised to operators."""
    return after(build, Canonicalize(), RecogniseMlps(), InsertKvCache(), PairPaths())


def plainly_paired(build: Callable[[], nn.Module]) -> Program:
    """The same at stage PAIRED, its MLPs left as linears."""
    return after(build, Canonicalize(), InsertKvCache(), PairPaths())


def one_mlp() -> Decoder:
    """One layer: an MLP."""
    return Decoder(Mlp())


def two_mixtures() -> Decoder:
    """Two layers of attention and experts, the second beside an MLP that all tokens share."""
    return Decoder(Attention(0), Mixture(0), Attention(1), Mixture(1, normalised=False), Mlp())


def two_layers() -> Decoder:
    """Two layers of attention and an MLP."""
    return Decoder(Attention(0), Mlp(), Attention(1), Mlp(bias=True))


def assert_prints(module: fx.GraphModule, expected: str) -> None:
    """Compares the printed graph with an inline snapshot; its weights are left out of both."""
    lines = [line for line in snapshot(module).splitlines() if not line.startswith("weight ")]
    assert "\n".join(lines) == inspect.cleandoc(expected)


def run_replacing(
    module: fx.GraphModule,
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    replacements: Mapping[Any, Callable[..., Any]],
) -> dict[str, Tensor]:
    """Runs a graph in float32 with some of its operators computed by other functions."""
    document = from_document(to_document(module), torch.float32, torch.device("cpu"))

    class Replacing(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return super().call_function(replacements.get(target, target), args, kwargs)

    def arguments() -> Iterator[Tensor]:
        for node in document.graph.nodes:
            if node.op == "placeholder":
                meta = node.meta
                yield weights[meta[WEIGHT]] if WEIGHT in meta else inputs[meta[INPUT]]

    values = Replacing(document).run(*arguments())
    return dict(zip(module.graph.output_node().meta[OUTPUTS], values, strict=True))
