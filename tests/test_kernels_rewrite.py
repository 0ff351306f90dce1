"""Norms and rotations as one call, and the graphs that are made to use them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx

from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.backends.rewrite import with_kernels, with_linears
from sirius_runtime.kernels.attention import cached_attention_by_tokens
from sirius_runtime.kernels.build import InstructionSet
from sirius_runtime.kernels.linear import linear, linears
from sirius_runtime.kernels.native import references, using
from sirius_runtime.kernels.pointwise import add_norm, gate, rms_norm, rotate
from tests.support.kernels import SETS, require
from tests.support.models import TinyModels
from tests.support.operators import randn, sirius

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
aten = torch.ops.aten


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    require(request.param)
    with using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def near(actual: Tensor, expected: Tensor) -> None:
    """Within a rounding or two: sums are added in another order than torch's."""
    assert actual.dtype is expected.dtype
    tolerance = 2 * ROUNDING[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "size"), [(3, 1), (3, 37), (3, 160), (1900, 37)])
def test_rms_norm(tokens: int, size: int, dtype: torch.dtype) -> None:
    """At 1900 tokens, threads share them."""
    x, weight = randn(2, tokens, size, seed=0, dtype=dtype), randn(size, seed=1, dtype=dtype)
    exact = x.double()
    exact = weight.double() * exact / (exact.square().mean(-1, keepdim=True) + 0.1).sqrt()
    actual = rms_norm(x, weight, 0.1, dtype)
    near(actual, exact.to(dtype))
    with references():
        near(actual, rms_norm(x, weight, 0.1, dtype))
    assert torch.equal(actual[1, 2], rms_norm(x[1, 2], weight, 0.1, dtype))  # alone, to the bit


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 37, 160])
def test_add_norm_is_a_sum_and_its_norm_to_the_bit(size: int, dtype: torch.dtype) -> None:
    x, y = randn(2, 3, size, seed=0, dtype=dtype), randn(3, 2, size, seed=1, dtype=dtype)
    y, weight = y.transpose(0, 1), randn(size, seed=2, dtype=dtype)
    total, normed = add_norm(x, y, weight, 0.1, dtype)
    assert torch.equal(total, x + y)
    assert torch.equal(normed, rms_norm(x + y, weight, 0.1, dtype))
    total, normed = add_norm(x, y[:1], weight, 0.1, dtype)  # one row for both
    assert torch.equal(total, x + y[:1])
    assert torch.equal(normed, rms_norm(x + y[:1], weight, 0.1, dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "half"), [(3, 1), (3, 5), (3, 24), (400, 24)])
def test_rotate(tokens: int, half: int, dtype: torch.dtype) -> None:
    """At 400 tokens, threads share the heads, which lie apart from the tokens."""
    x = randn(2, tokens, 4, 2 * half, seed=0, dtype=dtype).transpose(1, 2)
    cosine, sine = (randn(2, 1, tokens, 2 * half, seed=i, dtype=dtype) for i in (1, 2))
    actual = rotate(x, cosine, sine, half)
    with references():
        assert torch.equal(actual, rotate(x, cosine, sine, half)) or dtype is torch.float32
        near(actual, rotate(x, cosine, sine, half))
    first, second = x.double().split(half, -1)
    turned = torch.cat([-second, first], -1) * sine.double()
    exact = x.double() * cosine.double() + turned
    torch.testing.assert_close(
        actual.double(), exact, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype]
    )


def test_what_the_kernels_do_not_serve_is_computed_all_the_same() -> None:
    x, weight = randn(2, 4, seed=0).double(), randn(4, seed=1).double()
    wanted = weight * x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, 0.1, x.dtype), wanted, rtol=1e-5, atol=1e-5)
    q, cosine = randn(1, 2, 3, 4, seed=0).double(), randn(1, 1, 3, 4, seed=1).double()
    turned = torch.cat([-q[..., 2:], q[..., :2]], -1)
    torch.testing.assert_close(rotate(q, cosine, cosine, 2), (q + turned) * cosine)


# graphs


def targets(module: fx.GraphModule) -> Counter[object]:
    return Counter(node.target for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("entry", ["full", "sparse", "prefill", "observe"])
def test_a_llama_s_graph_uses_them_throughout(tiny: TinyModels, entry: str) -> None:
    model = tiny(method="griffin").model
    backend = model.backend
    assert isinstance(backend, EagerBackend)
    module = backend._entries[entry].module
    before = targets(module)
    after = targets(with_kernels(module))
    assert targets(module) == before  # a copy was rewritten
    layers = model.program.state.layers
    # The first norm's input is no sum.
    assert (after[rms_norm], after[add_norm]) == (1, 2 * layers)
    # Sums of norms, of rotations, and those that norms are taken of.
    assert after[aten.add.Tensor] == before[aten.add.Tensor] - (6 * layers + 1)
    assert after[rotate] == 2 * layers
    # q, k and v in one call; o; the head.
    assert before[aten.linear.default] == 4 * layers + 1
    assert (after[linears], after[linear]) == (layers, layers + 1)
    for gone in ("linear.default", "rsqrt.default", "neg.default", "pow.Tensor_Scalar"):
        assert not any(str(target) == f"aten.{gone}" for target in after)
    assert not any(str(target).startswith("sirius.") for target in after)
    assert after[cached_attention_by_tokens] == layers


def graph_of(function: Callable[..., Tensor], *examples: Tensor) -> fx.GraphModule:
    return torch.export.export(Wrapped(function), examples).graph_module


class Wrapped(torch.nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function  # type: ignore[assignment]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 0.1)
    return weight * scaled.to(torch.bfloat16)


def offset_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 0.1)
    return (scaled * (1.0 + weight.to(torch.float32))).to(torch.bfloat16)


def norm_over_tokens(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    scaled = wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + 0.1)
    return weight * scaled.to(torch.bfloat16)


def norm_of_cubes(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    scaled = wide * torch.rsqrt(wide.pow(3).mean(-1, keepdim=True) + 9.1)
    return weight * scaled.to(torch.bfloat16)


def norm_by_another(x: Tensor, weight: Tensor) -> Tensor:
    wide, other = x.to(torch.float32), weight.to(torch.float32)
    scaled = wide * torch.rsqrt(other.pow(2).mean(-1, keepdim=True) + 0.1)
    return weight * scaled.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("function", "fires"),
    [
        (norm, True),
        (offset_norm, False),
        (norm_over_tokens, False),
        (norm_of_cubes, False),
        (norm_by_another, False),
    ],
)
def test_only_the_norm_it_knows_is_replaced(function: Callable[..., Tensor], fires: bool) -> None:
    x, weight = randn(1, 3, 8, seed=0).bfloat16(), randn(8, seed=1).bfloat16()
    module = graph_of(function, x, weight)
    own = with_kernels(module)
    assert (targets(own)[rms_norm] == 1) == fires
    near(own(x, weight)[0], function(x, weight))


def rotation(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return x * cosine + torch.cat([-x[..., 4:], x[..., :4]], -1) * sine


def rotation_the_other_way(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return x * cosine + torch.cat([-x[..., :4], x[..., 4:]], -1) * sine


def rotation_of_two(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return x * cosine + torch.cat([-(x + 1)[..., 4:], x[..., :4]], -1) * sine


@pytest.mark.parametrize(
    ("function", "fires"),
    [(rotation, True), (rotation_the_other_way, False), (rotation_of_two, False)],
)
def test_only_the_rotation_it_knows_is_replaced(
    function: Callable[..., Tensor], fires: bool
) -> None:
    x = randn(1, 2, 3, 8, seed=0)
    cosine, sine = randn(1, 1, 3, 8, seed=1), randn(1, 1, 3, 8, seed=2)
    own = with_kernels(graph_of(function, x, cosine, sine))
    assert (targets(own)[rotate] == 1) == fires
    near(own(x, cosine, sine)[0], function(x, cosine, sine))


def gated(g: Tensor, u: Tensor) -> Tensor:
    return torch.nn.functional.silu(g) * u


def gated_from_the_right(g: Tensor, u: Tensor) -> Tensor:
    return u * torch.nn.functional.silu(g)


def activation_that_is_used_again(g: Tensor, u: Tensor) -> Tensor:
    active = torch.nn.functional.silu(g)
    return active * u + active


def activation_times_itself(g: Tensor, u: Tensor) -> Tensor:
    active = torch.nn.functional.silu(g)
    return active * active


@pytest.mark.parametrize(
    ("function", "fires"),
    [
        (gated, True),
        (gated_from_the_right, True),
        (activation_that_is_used_again, False),
        (activation_times_itself, False),
    ],
)
def test_only_the_gate_it_knows_is_replaced(function: Callable[..., Tensor], fires: bool) -> None:
    g, u = randn(3, 8, seed=0).bfloat16(), randn(3, 8, seed=1).bfloat16()
    own = with_kernels(graph_of(function, g, u))
    assert (targets(own)[gate] == 1) == fires
    near(own(g, u)[0], function(g, u))
    near(own(g, u[:1])[0], function(g, u[:1]))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate(dtype: torch.dtype) -> None:
    g, u = randn(1037, 3, seed=0, dtype=dtype).t(), randn(3, 1037, seed=1, dtype=dtype)
    given = g.clone()
    near(gate(g, u, "silu"), torch.nn.functional.silu(g) * u)
    assert torch.equal(g, given)


def test_what_others_use_too_stays() -> None:
    def both(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 0.1)
        return weight * (wide * root).to(torch.bfloat16) + root.to(torch.bfloat16)

    x, weight = randn(1, 3, 8, seed=0).bfloat16(), randn(8, seed=1).bfloat16()
    own = with_kernels(graph_of(both, x, weight))
    assert targets(own)[rms_norm] == targets(own)[aten.rsqrt.default] == 1
    near(own(x, weight)[0], both(x, weight))


def test_a_sum_that_is_used_again_and_its_norm_are_one_call() -> None:
    def residual(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        total = x + y
        return total + norm(total, weight)

    x, y = randn(1, 3, 8, seed=0).bfloat16(), randn(1, 3, 8, seed=1).bfloat16()
    weight = randn(8, seed=2).bfloat16()
    own = with_kernels(graph_of(residual, x, y, weight))
    assert (targets(own)[add_norm], targets(own)[rms_norm]) == (1, 0)
    near(own(x, y, weight)[0], residual(x, y, weight))


def test_a_norm_by_a_weight_that_is_computed_from_the_sum_stays_by_itself() -> None:
    def scaled(x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return norm(total, total[0, 0] * 2)

    x, y = randn(1, 3, 8, seed=0).bfloat16(), randn(1, 3, 8, seed=1).bfloat16()
    own = with_kernels(graph_of(scaled, x, y))
    assert (targets(own)[add_norm], targets(own)[rms_norm]) == (0, 1)
    near(own(x, y)[0], scaled(x, y))


def test_linears_of_one_input_are_one_call_to_the_bit() -> None:
    def both(x: Tensor, w: Tensor, v: Tensor, b: Tensor) -> Tensor:
        q, k = aten.linear.default(x, w, b), aten.linear.default(x, v)
        return torch.cat([q, k, aten.linear.default(q, v[:, :5])], -1)

    x, w, v, b = randn(2, 3, 7, seed=0), randn(5, 7, seed=1), randn(4, 7, seed=2), randn(5, seed=3)
    module = graph_of(both, x, w, v, b)
    own = with_kernels(module)
    after = targets(own)
    assert (after[linears], after[linear]) == (1, 1)
    apart = copy.deepcopy(module)
    for node in apart.graph.find_nodes(op="call_function", target=aten.linear.default):
        node.target = sirius.linear.default
    apart.recompile()
    arguments = (x, w, v, b)
    assert torch.equal(own(*arguments)[0], apart(*arguments)[0])
    compiled = with_linears(module)
    after = targets(compiled)
    assert (after[sirius.linears.default], after[sirius.linear.default]) == (1, 1)
    assert torch.equal(compiled(*arguments)[0], apart(*arguments)[0])
    with references():
        for graph in (own, compiled):
            torch.testing.assert_close(graph(*arguments)[0], module(*arguments)[0])


def test_a_linear_of_a_weight_that_is_computed_stays_by_itself() -> None:
    def both(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        q = aten.linear.default(x, w)
        return q + aten.linear.default(x, v + q.sum())

    x, w, v = randn(2, 7, seed=0), randn(4, 7, seed=1), randn(4, 7, seed=2)
    module = graph_of(both, x, w, v)
    own = targets(with_kernels(module))
    assert (own[linears], own[linear]) == (0, 2)
    own = targets(with_linears(module))
    assert (own[sirius.linears.default], own[sirius.linear.default]) == (0, 2)


def test_a_compiled_graph_joins_no_more_linears_than_one_launch_takes() -> None:
    def four(x: Tensor, w: Tensor, v: Tensor, u: Tensor, t: Tensor) -> Tensor:
        return torch.cat([aten.linear.default(x, weight) for weight in (w, v, u, t)], -1)

    def five(x: Tensor, *weights: Tensor) -> Tensor:
        return four(x, *weights[:4]) + aten.linear.default(x, weights[4])

    x, *weights = randn(2, 7, seed=0), *(randn(1, 7, seed=i) for i in range(5))
    for function, joined in ((four, 1), (five, 0)):
        given = (x, *weights[: 4 if function is four else 5])
        own = with_linears(graph_of(function, *given))
        assert targets(own)[sirius.linears.default] == joined
        near(own(*given)[0], function(*given))
