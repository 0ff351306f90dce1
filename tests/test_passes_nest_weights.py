"""nest_weights: weights of linears, MLPs and embeddings become two planes; a draft reads one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sirius_passes.lay_out_weights import LayOutWeights
from sirius_passes.manager import Pass, run_passes
from sirius_passes.nest_weights import NestWeights, reasons_text
from sirius_passes.program import FULL, SPARSE, Program, call, calls
from sirius_passes.sparsify import Threshold
from sirius_passes.sparsify_cats import SparsifyCats
from sirius_passes.sparsify_griffin import SparsifyGriffin
from sirius_passes.sparsify_teal import SparsifyTeal
from sirius_passes.sparsify_topk import SparsifyTopk
from sirius_passes.stored_form import checkpoint_shape
from sirius_passes.testing import PassCheck, check_pass
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.kernels.native import references
from sirius_runtime.nested import in_steps, nest, unnest
from sirius_runtime.ops import mlp
from sirius_runtime.safetensors_file import size_of
from sirius_runtime.spec import Layout, WeightSpec
from tests.support.fast import gate_but, slow_but
from tests.support.graphs import assert_prints, one_mlp, paired, plainly_paired, run_replacing

aten, sirius = torch.ops.aten, torch.ops.sirius
VOCABULARY, WIDTH, NEURONS = 11, 32, 64


class Attention(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.qkv = nn.Linear(WIDTH, 96, bias=True)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (-1, 16)).transpose(1, 2) for y in self.qkv(x).split(WIDTH, dim=-1)
        )
        y = sirius.attention(q, k, v, self.layer, 0.25, None, None, None)
        return self.o(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, neurons: int = NEURONS) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, neurons, bias=False)
        self.up = nn.Linear(WIDTH, neurons, bias=False)
        self.down = nn.Linear(neurons, WIDTH, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FusedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(WIDTH, 2 * NEURONS, bias=False)
        self.down = nn.Linear(NEURONS, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """Embeddings, residual layers with weighted norms, and a head, which may be tied."""

    def __init__(self, *layers: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Parameter(torch.empty(WIDTH))
        self.head = None if tied else nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x * self.norm)
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)


def one_layer() -> Decoder:
    return Decoder(Attention(0), Mlp())


def tied() -> Decoder:
    return Decoder(Attention(0), FusedMlp(), tied=True)


SPARSIFY: dict[str, Callable[[], Pass | None]] = {
    "topk": lambda: SparsifyTopk(0.5),
    "cats": lambda: SparsifyCats(0.5, (Threshold(0.1, 0.5),)),
    "griffin": lambda: SparsifyGriffin(0.5),
    "teal": lambda: SparsifyTeal(0.5, None),
    "none": lambda: None,
}


def laid_out(build: Callable[[], nn.Module], method: str = "topk") -> Program:
    raised = method not in ("teal", "none")
    program = paired(build) if raised else plainly_paired(build)
    program.state = replace(program.state, kv_heads=2, key_dim=16, value_dim=16)
    sparsify = SPARSIFY[method]()
    run_passes(program, [*([sparsify] if sparsify else []), LayOutWeights()])
    return program


def nested(build: Callable[[], nn.Module], method: str = "topk", bits: int = 4) -> Program:
    program = laid_out(build, method)
    run_passes(program, [NestWeights(bits)])
    return program


# graphs


def test_before_and_after() -> None:
    program = laid_out(lambda: Decoder(Mlp()))
    inputs = """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        input %slots: int64[B, T]
        input %length: int64[B]
        input %tree_mask: int64[R, T, M]
        input %k_cache: model[layers, B, G, S, D]
        input %v_cache: model[layers, B, G, S, Dv]"""
    assert_prints(
        program.graphs[SPARSE],
        inputs
        + """
        %14: model[B, T, 32] = aten.embedding(%embed.weight, %input_ids)
        %15: model[B, T, 32] = aten.mul.Tensor(%14, %norm)
        %16: model[B, T, 32] = sirius.topk_mlp(%15, %layers.0.gate.weight, %layers.0.up.weight, %layers.0.down.weight, None, None, %layers.0.down.bias, 'silu', 0, 32)
        %17: model[B, T, 32] = aten.add.Tensor(%14, %16)
        %18: model[B, T, 11] = aten.linear(%17, %head.weight)
        return logits=%18
        """,  # noqa: E501
    )
    step = NestWeights(4)
    run_passes(program, [step])
    assert step.not_nested == {}
    assert_prints(
        program.graphs[SPARSE],
        inputs
        + """
        %14: model[B, T, 32] = sirius.embedding(%embed.weight, %input_ids, model)
        %15: model[B, T, 32] = aten.mul.Tensor(%14, %norm)
        %16: uint8[1, 64, 17] = aten.slice.Tensor(%layers.0.gate.weight, 0, 0, 1)
        %17: uint8[1, 64, 17] = aten.slice.Tensor(%layers.0.up.weight, 0, 0, 1)
        %18: uint8[1, 2, 34, 16] = aten.slice.Tensor(%layers.0.down.weight, 0, 0, 1)
        %19: model[B, T, 32] = sirius.topk_mlp(%15, %16, %17, %18, None, None, %layers.0.down.bias, 'silu', 0, 32)
        %20: model[B, T, 32] = aten.add.Tensor(%14, %19)
        %21: uint8[1, 11, 17] = aten.slice.Tensor(%head.weight, 0, 0, 1)
        %22: model[B, T, 11] = sirius.linear(%20, %21)
        return logits=%22
        """,  # noqa: E501
    )
    assert_prints(
        program.graphs[FULL],
        inputs
        + """
        %14: model[B, T, 32] = sirius.embedding(%embed.weight, %input_ids, model)
        %15: model[B, T, 32] = aten.mul.Tensor(%14, %norm)
        %16: model[B, T, 32] = sirius.dense_mlp(%15, %layers.0.gate.weight, %layers.0.up.weight, %layers.0.down.weight, None, None, %layers.0.down.bias, 'silu', 0)
        %17: model[B, T, 32] = aten.add.Tensor(%14, %16)
        %18: model[B, T, 11] = sirius.linear(%17, %head.weight)
        return logits=%18
        """,  # noqa: E501
    )


def test_the_table_says_how_a_weight_is_stored() -> None:
    program = nested(lambda: Decoder(Mlp()))
    assert program.weights["layers.0.gate.weight"] == WeightSpec(
        "layers.0.gate.weight", "uint8", (2, 64, 17), retype=False, nested=Layout.BY_OUTPUTS
    )
    down = program.weights["layers.0.down.weight"]
    assert down == WeightSpec(
        "layers.0.down.weight",
        "uint8",
        (2, 2, 34, 16),
        transposed=True,
        retype=False,
        nested=Layout.BY_INPUTS,
    )
    assert checkpoint_shape(down) == (WIDTH, NEURONS)
    assert down.numbers == WIDTH * NEURONS
    assert program.weights["norm"] == WeightSpec("norm", "bfloat16", (WIDTH,))


def test_with_eight_bits_both_paths_read_all() -> None:
    program = nested(one_layer, "none", bits=8)
    assert program.sparsity.density == 1.0
    assert program.sparsity.draft_bits == 8
    for module in program.graphs.values():
        assert not [n for n in calls(module.graph, aten.slice.Tensor) if n.args[1:] == (0, 0, 1)]


def test_a_fused_weight_is_read_in_parts_of_its_planes() -> None:
    graph = nested(tied, "topk").graphs[SPARSE].graph
    (node,) = calls(graph, sirius.topk_mlp.default)
    parts = [value.args[1:] for value in node.args[1:3]]  # type: ignore[union-attr]
    assert parts == [(1, 0, NEURONS), (1, NEURONS, 2 * NEURONS)]


def test_a_fused_weight_by_inputs_is_cut_by_bytes() -> None:
    """For linears that skip channels, outputs are columns, and a byte holds two of them."""
    program = nested(one_layer, "teal")
    assert program.weights["layers.0.qkv.weight"].shape == (2, 1, 34, 48)
    reads = calls(program.graphs[SPARSE].graph, sirius.sparse_linear.default)
    cuts = [node.args[1].args[1:] for node in reads[:3]]  # type: ignore[union-attr]
    assert cuts == [(3, 0, 16), (3, 16, 32), (3, 32, 48)]


# what stays


class Odd(nn.Module):
    """One linear's inputs, and another's outputs, are not a multiple of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.narrow(x)))


def left(build: Callable[[], nn.Module], method: str = "topk") -> dict[str, str]:
    step = NestWeights(4)
    run_passes(laid_out(build, method), [step])
    return step.not_nested


def test_odd_widths_stay_and_say_why() -> None:
    assert left(lambda: Decoder(Mlp(), Odd())) == {
        "layers.1.wide.weight": "its 24 inputs are not a multiple of 32"
    }


def test_an_mlp_stays_whole() -> None:
    """Its down has 48 inputs and can't be nested, so gate and up are not nested either."""
    found = left(lambda: Decoder(Mlp(48), Mlp()))
    assert found == {
        "layers.0.down.weight": "its 48 inputs are not a multiple of 32",
        "layers.0.gate.weight": "another weight of its MLP can't be nested",
        "layers.0.up.weight": "another weight of its MLP can't be nested",
    }
    assert reasons_text(found) == (
        "2 (layers.0.gate.weight: another weight of its MLP can't be nested), "
        "1 (layers.0.down.weight: its 48 inputs are not a multiple of 32)"
    )


@pytest.mark.gate
def test_parts_that_cut_through_bytes_stay() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused, self.out = nn.Linear(WIDTH, 96), nn.Linear(48, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.fused(x).split(48, dim=-1)
            return self.out(one * other)

    def build() -> nn.Module:
        return Decoder(Attention(0), Parts(), Mlp())

    reason = "it is sliced at indices that are no multiples of 32"
    assert left(build, "teal")["layers.1.fused.weight"] == reason
    assert "layers.1.fused.weight" not in left(build, "topk")  # rows can be cut anywhere


def reading_part_of_the_head(*limits: int) -> Program:
    program = laid_out(one_layer)
    for module in program.graphs.values():
        (head,) = (n for n in calls(module.graph, aten.linear.default) if "head" in str(n.args[1]))
        with module.graph.inserting_before(head):
            part = call(module.graph, aten.slice.Tensor, (head.args[1], *limits), origin="test")
        head.replace_input_with(head.args[1], part)  # type: ignore[arg-type]
    return program


def test_columns_of_nested_rows_stay() -> None:
    program, step = reading_part_of_the_head(1, 0, WIDTH), NestWeights(4)
    step.run(program)
    assert step.not_nested == {
        "head.weight": "it is sliced in a way that the nested layout does not support"
    }


def test_rows_that_alternate_are_rows_of_the_planes() -> None:
    program, step = reading_part_of_the_head(0, 0, VOCABULARY, 2), NestWeights(4)
    step.run(program)
    assert step.not_nested == {}
    head = calls(program.graphs[FULL].graph, sirius.linear.default)[-1]
    assert head.args[1].meta["val"].shape == (2, 6, 17)  # type: ignore[union-attr]
    assert head.args[1].args[1:] == (1, 0, VOCABULARY, 2)  # type: ignore[union-attr]


def test_what_other_operators_read_stays() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.empty(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table.cos()

    assert left(lambda: Decoder(Mlp(), Own())) == {"layers.1.table": "aten.cos.default reads it"}


def test_what_keeps_its_dtype_stays() -> None:
    program = laid_out(one_layer)
    program.update_weight("layers.0.o.weight", retype=False)
    step = NestWeights(4)
    run_passes(program, [step])
    assert step.not_nested == {
        "layers.0.o.weight": "it is kept in bfloat16 whatever the model's dtype"
    }


class Experts(nn.Module):
    """Two of three experts a token; gate and up are one weight, whose rows alternate if `step` is
    2, as in gpt-oss.
    """

    def __init__(self, step: int = 1, neurons: int = NEURONS, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * neurons, WIDTH))
        self.down = nn.Parameter(torch.empty(experts, WIDTH, neurons))
        self.bias = nn.Parameter(torch.empty(experts, WIDTH))
        self.step, self.neurons = step, neurons

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, experts = self.router(flat).float().softmax(-1).topk(2)
        if self.step == 2:
            gate, up = self.gate_up[:, ::2], self.gate_up[:, 1::2]
        else:
            gate, up = self.gate_up[:, : self.neurons], self.gate_up[:, self.neurons :]
        mlps = gate, up, self.down.transpose(1, 2), None, None, self.bias, "silu", 0
        return sirius.dense_moe(flat, experts, weights, *mlps).reshape(x.shape)


@pytest.mark.parametrize("step", [1, 2])
def test_experts_are_nested_and_their_router_is_not(step: int) -> None:
    program, nest_weights = laid_out(lambda: Decoder(Experts(step), Mlp())), NestWeights(4)
    run_passes(program, [nest_weights])
    assert nest_weights.not_nested == {"layers.0.router.weight": "it routes tokens to experts"}
    gate_up, down = (program.weights[f"layers.0.{name}"] for name in ("gate_up", "down"))
    assert (gate_up.nested, gate_up.shape) == (Layout.BY_OUTPUTS, (2, 3, 128, 17))
    assert (down.nested, down.shape) == (Layout.BY_INPUTS, (2, 3, 2, 34, 16))
    assert gate_up.of_experts
    assert down.of_experts
    assert (gate_up.numbers, down.numbers) == (3 * 128 * WIDTH, 3 * WIDTH * NEURONS)
    assert checkpoint_shape(down) == (3, WIDTH, NEURONS)
    (node,) = calls(program.graphs[SPARSE].graph, sirius.topk_moe.default)
    cuts = [value.args[1:] for value in node.args[3:5]]  # type: ignore[union-attr]
    assert cuts == ([(2, 0, 64), (2, 64, 128)] if step == 1 else [(2, 0, 128, 2), (2, 1, 128, 2)])
    assert node.args[5].args[1:] == (0, 0, 1)  # type: ignore[union-attr]
    assert not NestWeights(4).run(program)  # nothing is left to do


def test_a_mixture_stays_whole() -> None:
    found = left(lambda: Decoder(Experts(neurons=48), Mlp()))
    assert found["layers.0.down"] == "its 48 inputs are not a multiple of 32"
    assert found["layers.0.gate_up"] == "another weight of its MLP can't be nested"
    assert "layers.0.bias" not in found


def test_a_step_reads_the_nested_experts_of_one_token() -> None:
    """Computed by hand, for two of three experts; a topk draft keeps half of their neurons."""
    program = nested(lambda: Decoder(Experts()))
    experts = 2 * 3 * NEURONS * WIDTH * 17 // 16  # of two
    others = (
        2 * (3 * WIDTH + 3 * WIDTH + WIDTH) - 2 * WIDTH
    )  # router, two biases, norm, in bfloat16
    matrices = 2 * VOCABULARY * WIDTH * 17 // 16
    assert program.sparsity.step == experts + matrices + others
    draft = experts * (1 / 3 + 2 / 3 / 2) / 2 + matrices * (1 + 1 / 2) / 2 + others
    assert program.sparsity.density == pytest.approx(draft / program.sparsity.step)


def test_a_model_of_which_nothing_can_be_nested_is_refused() -> None:
    program = paired(one_mlp)  # of widths 6 and 10
    run_passes(program, [LayOutWeights()])
    with pytest.raises(UnsupportedModelError, match=r"--weights int8: no weight .* its 6 inputs"):
        run_passes(program, [NestWeights(4)])


# density


@pytest.mark.parametrize("method", gate_but(SPARSIFY, {"topk", "griffin"}))
def test_density_counts_the_bytes_of_what_is_read(method: str) -> None:
    """Of bytes, by hand: 17 for each 16 numbers that are nested, half of them in a draft, which
    reads embeddings in full.
    """
    before, program = laid_out(one_layer, method), nested(one_layer, method)
    matrices = sum(w.numbers for w in program.weights.values() if w.nested)
    embeddings = VOCABULARY * WIDTH * 17 / 32
    others = sum(size_of(w) for w in program.weights.values() if not w.nested)
    assert program.sparsity.step == others + matrices * 17 // 16
    # What the method skips, of matrices in bfloat16 as before.
    skipped = sum((s.units - s.kept) * s.params for s in before.sparsity.sites) / 2
    draft = others + embeddings + (matrices - skipped) * 17 / 32
    assert program.sparsity.density == pytest.approx(draft / program.sparsity.step)


# numbers


class AsNested:
    """What operators compute where the weights of the program `old`, of these values, are nested in
    these layouts, by the words of the format; `planes` of them are read, of embeddings both.
    """

    def __init__(self, weights: Mapping[str, Tensor], layouts: Mapping[str, Layout], planes: int):
        self._layouts = layouts
        self.weights = {name: self._read(name, w, planes) for name, w in weights.items()}
        self._rows = {id(w): self._read(name, weights[name], 2) for name, w in self.weights.items()}

    def _read(self, name: str, weight: Tensor, planes: int) -> Tensor:
        if name not in self._layouts:
            return weight
        layout = self._layouts[name]
        matrix = weight if layout is Layout.BY_OUTPUTS else weight.mT
        values = unnest(nest(matrix, layout)[:planes])
        return values if layout is Layout.BY_OUTPUTS else values.mT

    def replacements(self) -> dict[Any, Callable[..., Any]]:
        """A product whose activations are rounded to integer steps."""

        def through(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.linear(in_steps(x), weight, bias)

        def skipping(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float) -> Any:
            kept = x.abs().mean(1, keepdim=True) > threshold
            return through(x * kept, weight.mT, bias), kept.sum((1, 2))

        def embedding(weight: Tensor, ids: Tensor) -> Tensor:
            return self._rows[id(weight)][ids]

        return {
            aten.linear.default: through,
            sirius.sparse_linear.default: skipping,
            aten.embedding.default: embedding,
        }


def reference(layouts: Mapping[str, Layout], bits: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each graph's expected outputs with weights nested in these layouts."""

    def run(
        name: str,
        source: fx.GraphModule,
        inputs: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        planes = 1 if name == SPARSE and bits == 4 else 2
        own = AsNested(weights, layouts, planes)
        with monkeypatch.context() as patch:
            through = own.replacements()[aten.linear.default]
            patch.setattr(mlp, "linear", through)  # of the MLPs' references
            return run_replacing(source, inputs, own.weights, own.replacements())

    return run


@pytest.mark.parametrize(
    ("method", "bits"),
    slow_but(product(SPARSIFY, (4, 8)), {("topk", 4)}, {("teal", 4), ("griffin", 4), ("cats", 8)}),
)
def test_both_paths_compute_with_what_they_read(
    method: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tied if method == "topk" else one_layer
    program = laid_out(build, method)
    before = dict(program.weights)
    layouts = {
        name: spec.nested
        for name, spec in nested(build, method, bits).weights.items()
        if spec.nested
    }
    found = check(program, bits, reference(layouts, bits, monkeypatch))
    assert found.rewrites == len(layouts) == (5 if build is tied else 7)
    assert {n: s for n, s in before.items() if n not in layouts}.items() <= program.weights.items()


def check(program: Program, bits: int, wanted: Any) -> PassCheck:
    """With reference operators, because kernels have tests of their own."""
    with references():
        return check_pass(program, NestWeights(bits), reference=wanted, rtol=1e-3, atol=1e-3)
