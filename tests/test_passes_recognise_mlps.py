"""recognise_mlps: a gated MLP becomes one operator; what is none is refused with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sirius_passes.canonicalize import Canonicalize
from sirius_passes.program import DENSE, Program, calls
from sirius_passes.recognise_mlps import DENSE_MLP, RecogniseMlps
from sirius_passes.testing import check_pass
from sirius_runtime.errors import UnsupportedModelError
from tests.support.graphs import Decoder, FusedMlp, Mlp, Plain, after, assert_prints


def canonical(*layers: Callable[[], nn.Module]) -> Program:
    return after(lambda: Decoder(*(layer() for layer in layers)), Canonicalize())


def test_before_and_after() -> None:
    program = canonical(Mlp)
    assert_prints(
        program.graphs[DENSE],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        %8: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %9: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %10: model[B, T, 6] = aten.add.Tensor(%8, %9)
        %11: model[B, T, 10] = aten.linear(%10, %layers.0.gate.weight)
        %12: model[B, T, 10] = aten.silu(%11)
        %13: model[B, T, 10] = aten.linear(%10, %layers.0.up.weight)
        %14: model[B, T, 10] = aten.mul.Tensor(%12, %13)
        %15: model[B, T, 6] = aten.linear(%14, %layers.0.down.weight)
        %16: model[B, T, 6] = aten.add.Tensor(%10, %15)
        %17: model[B, T, 11] = aten.linear(%16, %head.weight)
        return logits=%17
        """,
    )
    expect = {"sirius.dense_mlp": (0, 1), "aten.linear": (4, 1), "aten.silu": (1, 0)}
    assert check_pass(program, RecogniseMlps(), expect=expect).rewrites == 1
    assert_prints(
        program.graphs[DENSE],
        """
        input %input_ids: int64[B, T]
        input %positions: int64[B, T]
        %8: model[B, T, 6] = aten.embedding(%embed.weight, %input_ids)
        %9: model[B, T, 6] = aten.embedding(%place.weight, %positions)
        %10: model[B, T, 6] = aten.add.Tensor(%8, %9)
        %11: model[10, 6] = aten.t(%layers.0.down.weight)
        %12: model[B, T, 6] = sirius.dense_mlp(%10, %layers.0.gate.weight, %layers.0.up.weight, %11, None, None, None, 'silu', 0)
        %13: model[B, T, 6] = aten.add.Tensor(%10, %12)
        %14: model[B, T, 11] = aten.linear(%13, %head.weight)
        return logits=%14
        """,  # noqa: E501
    )


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_and_biases(act: str, bias: bool) -> None:
    program = canonical(lambda: Mlp(ACTIVATIONS[act], bias=bias))
    check_pass(program, RecogniseMlps(), expect={"sirius.dense_mlp": (0, 1)})
    (mlp,) = calls(program.graphs[DENSE].graph, DENSE_MLP)
    *_, gate_bias, up_bias, down_bias, name, _layer = mlp.args
    assert name == act
    assert [b is not None for b in (gate_bias, up_bias, down_bias)] == [bias] * 3


def test_layers_are_numbered_in_order() -> None:
    program = canonical(Mlp, Mlp, Mlp)
    assert check_pass(program, RecogniseMlps()).rewrites == 3
    assert [n.args[-1] for n in calls(program.graphs[DENSE].graph, DENSE_MLP)] == [0, 1, 2]


class UpFirst(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.act(self.gate(x)))


def test_up_may_come_before_gate() -> None:
    check_pass(canonical(UpFirst), RecogniseMlps(), expect={"sirius.dense_mlp": (0, 1)})


def test_a_fused_gate_up_is_recognised_once_it_is_split() -> None:
    program = canonical(lambda: FusedMlp(lambda y: y.chunk(2, -1), bias=True))
    check_pass(
        program, RecogniseMlps(), expect={"sirius.dense_mlp": (0, 1), "aten.slice.Tensor": (4, 4)}
    )


class ReadsInside(Mlp):
    """A gated MLP of which one inner value is read outside of it."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        inner = {"gate": gate, "up": up, "activated": F.silu(gate)}
        inner["product"] = inner["activated"] * up
        return self.down(inner["product"]) + inner[self.which].sum(-1, keepdim=True)


class TwoInputs(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x.tanh()))


class UpIsNoLinear(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x).tanh())


class OneLinear(Mlp):
    """x · silu(x) of one linear: gate and up are the same."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.down(F.silu(gate) * gate)


NEAR_MISSES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two matrices": (Plain, r"a plain MLP, fc2\(gelu\(fc1\(x\)\)\)"),
    **{
        f"{which} read elsewhere": (
            lambda which=which: ReadsInside(which),
            f"{name} inside the MLP is read from outside it",
        )
        for which, name in {
            "gate": "linear",
            "up": "linear_1",
            "activated": "silu",
            "product": "mul",
        }.items()
    },
    "different inputs": (TwoInputs, r"gate and up read different inputs, \w+ and tanh"),
    "up is no linear": (UpIsNoLinear, r"gate or up is not a linear"),
    "gate is up": (OneLinear, r"linear inside the MLP is read from outside it"),
    "unknown activation": (lambda: Mlp(torch.tanh), "aten.tanh.default is none of the known"),
    "scaled activation": (
        lambda: Mlp(lambda x: F.silu(x) * 2),
        "aten.mul.Tensor is none of the known",
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_a_model_without_a_dense_mlp_is_refused_with_the_nearest_miss(case: str) -> None:
    layer, reason = NEAR_MISSES[case]
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        RecogniseMlps().run(canonical(layer))
    assert "--sparsity none" in str(refusal.value)


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_misses_stay_beside_a_dense_mlp(case: str) -> None:
    layer, _ = NEAR_MISSES[case]
    program = canonical(layer, Mlp)
    linears = len(calls(program.graphs[DENSE].graph, torch.ops.aten.linear.default))
    expect = {"sirius.dense_mlp": (0, 1), "aten.linear": (linears, linears - 3)}
    assert check_pass(program, RecogniseMlps(), expect=expect).rewrites == 1


def test_run_again_it_finds_the_operators_there_and_does_not_refuse() -> None:
    program = canonical(Mlp)
    assert [RecogniseMlps().run(program) for _ in range(2)] == [1, 0]
