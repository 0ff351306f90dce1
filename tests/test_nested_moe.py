"""Mixtures of nested experts: kernels and references against a loop over tokens and experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_runtime.errors import OperandIndexError
from sirius_runtime.kernels.build import InstructionSet
from sirius_runtime.kernels.native import references, using
from sirius_runtime.nested import Layout, in_steps, nest, nested_shape, unnest
from sirius_runtime.ops import moe
from sirius_runtime.ops.moe import EXPERT_ACTIVATIONS
from tests.support.kernels import SETS, forbid_references, require
from tests.support.operators import randn, sirius

N, K, E, C, I = 9, 3, 5, 96, 160  # noqa: E741
OPERATORS: dict[str, tuple[Any, ...]] = {
    "dense_moe": (),
    "topk_moe": (200,),
    "experts_moe": (2, True),
}
NEAR = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 6e-3}


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    require(request.param)
    with using(request.param):
        yield request.param


def routed(tokens: int, experts: int, each: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """x, and each token's experts and their weights."""
    weights, chosen = randn(tokens, experts, seed=1).softmax(-1).topk(each)
    return [randn(tokens, width, seed=0, dtype=dtype), chosen, weights]


@pytest.fixture(scope="module")
def nested() -> list[Tensor]:
    """gate, up and down of all experts."""
    by_outputs = [randn(E, I, C, seed=i) / C**0.5 for i in (2, 3)]
    by_inputs = randn(E, C, I, seed=4) / I**0.5
    return [
        *(torch.stack([nest(w, Layout.BY_OUTPUTS) for w in own], 1) for own in by_outputs),
        torch.stack([nest(w, Layout.BY_INPUTS) for w in by_inputs], 1),
    ]


def arguments(
    weights: list[Tensor],
    planes: int,
    *,
    tokens: int = N,
    dtype: torch.dtype = torch.float32,
    act: str = "silu",
    bias: bool = True,
) -> list[Any]:
    biases = [randn(E, n, seed=5 + i, dtype=dtype) for i, n in enumerate((I, I, C))]
    return [
        *routed(tokens, E, K, C, dtype),
        *(weight[:planes] for weight in weights),
        *(biases if bias else (None, None, None)),
        act,
        0,
    ]


def by_loops(name: str, *args: Any) -> Tensor:
    """Token by token, expert by expert, in float64, of the numbers that the weights stand for."""
    x, experts, weights, gate, up, down, *biases, act, _ = args[:11]
    extra = args[11:]

    def through(v: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
        y = unnest(weight[:, expert]).double() @ in_steps(v).double()
        return y if bias is None else y + bias[expert].double()

    result = torch.zeros(x.shape, dtype=torch.float64)
    for n, token in enumerate(x):
        own = list(zip(experts[n].tolist(), weights[n].double().tolist(), strict=True))
        if name == "experts_moe":
            keep, normalised = extra
            total = sum(share for _, share in own)
            own = sorted(own, key=lambda pair: -pair[1])[:keep]
            if normalised:
                left = sum(share for _, share in own)
                own = [(expert, share * total / left) for expert, share in own]
        g = {e: EXPERT_ACTIVATIONS[act](through(token, gate, biases[0], e)) for e, _ in own}
        if name == "topk_moe":
            scores = torch.cat([g[expert].abs() * share for expert, share in own])
            least = scores.topk(extra[0]).values[-1]
            for expert, share in own:
                g[expert] = g[expert].where(g[expert].abs() * share >= least, 0.0)
        for expert, share in own:
            u = through(token, up, biases[1], expert) if up is not None else None
            z = moe.gated(g[expert], u, act)
            result[n] += share * through(z.float(), down, biases[2], expert)
    return result


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, of the token that is worst."""
    return float(((found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", OPERATORS)
def test_references(name: str, planes: int, bias: bool, nested: list[Tensor]) -> None:
    for act in ("silu", "clamped_swiglu"):
        args = [*arguments(nested, planes, act=act, bias=bias), *OPERATORS[name]]
        wanted = by_loops(name, *args)
        with references():
            assert error(getattr(sirius, name)(*args), wanted) <= NEAR[torch.float32]
        decomposed = getattr(moe, f"decomposed_{name}")
        assert error(decomposed(*args), wanted) <= NEAR[torch.float32]


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", OPERATORS)
def test_kernels(
    isa: InstructionSet,
    name: str,
    planes: int,
    nested: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid_references(monkeypatch)
    for tokens in (1, 2, N):
        args = [*arguments(nested, planes, tokens=tokens), *OPERATORS[name]]
        assert error(getattr(sirius, name)(*args), by_loops(name, *args)) <= NEAR[torch.float32]
    args = [*arguments(nested, planes, act="clamped_swiglu"), *OPERATORS[name]]
    assert error(getattr(sirius, name)(*args), by_loops(name, *args)) <= NEAR[torch.float32]
    if name != "topk_moe":  # in 16 bits, scores at the border differ by a rounding
        for dtype in (torch.bfloat16, torch.float16):
            args = [*arguments(nested, planes, tokens=3, dtype=dtype), *OPERATORS[name]]
            assert error(getattr(sirius, name)(*args), by_loops(name, *args)) <= NEAR[dtype]


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_tokens_output_is_its_own_to_the_bit(
    isa: InstructionSet, name: str, planes: int, nested: list[Tensor]
) -> None:
    tokens = 8 if name == "topk_moe" else N  # more of them are masked, not skipped
    x, experts, weights, *rest = [*arguments(nested, planes, tokens=tokens), *OPERATORS[name]]
    operator = getattr(sirius, name)
    together = operator(x, experts, weights, *rest)
    for few in (1, 2, 5):
        parts = zip(x.split(few), experts.split(few), weights.split(few), strict=True)
        assert torch.equal(torch.cat([operator(*part, *rest) for part in parts]), together)


def test_rows_of_gate_and_up_may_alternate(isa: InstructionSet, nested: list[Tensor]) -> None:
    x, experts, weights, gate, up, *rest = arguments(nested, 2)
    both = torch.stack([gate, up], 3).flatten(2, 3)
    mixed = sirius.dense_moe(x, experts, weights, both[:, :, ::2], both[:, :, 1::2], *rest)
    assert torch.equal(mixed, sirius.dense_moe(x, experts, weights, gate, up, *rest))


def test_experts_that_are_not_there_are_refused(nested: list[Tensor]) -> None:
    require(InstructionSet.PORTABLE)
    x, experts, *rest = arguments(nested, 2)
    experts[3, 1] = E
    with pytest.raises(OperandIndexError, match=f"experts holds {E}, an index out of range"):
        sirius.dense_moe(x, experts, *rest)


WIDTH, NEURONS, EXPERTS, ROUTED = 2048, 768, 5, 4  # of Qwen3-30B-A3B, but for its 128 experts


def exact_planes(outputs: int, inputs: int, layout: Layout, seed: int) -> Tensor:
    """Numbers as they come, and scales that are powers of two."""
    generator = torch.Generator().manual_seed(seed)
    shape = nested_shape(outputs, inputs, layout, (EXPERTS,))
    planes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    by_outputs = layout is Layout.BY_OUTPUTS
    high, low = planes[..., inputs // 2 :] if by_outputs else planes[:, :, :, 32:]
    high.copy_(0x20 + high % 2 * 8)
    low.zero_()
    return planes


@pytest.fixture(scope="module")
def real() -> list[tuple[str, list[Any], Tensor]]:
    """Calls at a real model's shapes, and what they give. Every product of gate and up is exact in
    float32, so that no rounding decides what down meets.
    """
    weights = [exact_planes(NEURONS, WIDTH, Layout.BY_OUTPUTS, seed) for seed in (1, 2)]
    weights.append(exact_planes(WIDTH, NEURONS, Layout.BY_INPUTS, 3))
    x, *routing = routed(1, EXPERTS, ROUTED, WIDTH, torch.float32)
    x = x.round()
    x[:, ::32] = 127  # so that a step is 1
    calls = []
    for planes in (1, 2):
        own = [x, *routing, *(weight[:planes] for weight in weights), None, None, None, "relu", 0]
        for name, extra in (("dense_moe", []), ("topk_moe", [NEURONS])):
            calls.append((name, [*own, *extra], by_loops(name, *own, *extra)))
    return calls


def test_at_a_real_models_shapes(
    isa: InstructionSet, real: list[tuple[str, list[Any], Tensor]]
) -> None:
    for name, args, wanted in real:
        assert error(getattr(sirius, name)(*args), wanted) <= 1e-5, name
