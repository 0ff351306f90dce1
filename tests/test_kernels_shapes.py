"""The CPU kernels at the shapes of published models, and across every border of the code.

Against float32 products of the same rounded weights, for every kernel, type and instruction set.
Linears and MLPs take numbers whose sums are exact (`tests.support.exact`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_runtime.kernels import pointwise
from sirius_runtime.kernels.attention import block_attention_, cached_attention_by_tokens
from sirius_runtime.kernels.build import InstructionSet, instruction_sets
from sirius_runtime.kernels.native import references, using
from sirius_runtime.ops.moe import largest
from tests.support import naive, shapes
from tests.support.exact import by_inputs, by_outputs, calls, integers, shared
from tests.support.fast import slow_but
from tests.support.kernels import forbid_references, require
from tests.support.operators import randn, sirius
from tests.support.shapes import MODELS, THREADS, TOKENS, Model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAST_PLACE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""A unit in the last place of a type that rounds; in float32, what the order of sums makes."""

ATTENTION = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
BIG = 1 << 26
"""Numbers of a weight above which a call takes one number of threads instead of all in turn."""

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
mostly_bfloat16 = pytest.mark.parametrize("dtype", slow_but(DTYPES, {torch.bfloat16}), ids=str)
"""Borders are the same for all types; `test_kernels` runs all of them at smaller shapes."""
every_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    require(InstructionSet.PORTABLE)
    forbid_references(monkeypatch)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(size: int, tokens: tuple[int, ...]) -> Iterator[tuple[str, int, slice]]:
    """Calls by every instruction set, on all numbers of threads in turn, one token on each. The
    first word says which call it is; `size`: numbers of the weight.
    """
    turn = 0
    for isa in instruction_sets():
        for count, own in calls(tokens):
            for several in THREADS if count == 1 and size <= BIG else [THREADS[turn % 4]]:
                with using(isa), threads(several):
                    yield f"{isa}, {count} tokens, {several} threads", count, own
            turn += 1


def equal(actual: Tensor, expected: Tensor, which: str) -> None:
    wrong = (actual != expected).nonzero()
    assert not len(wrong), f"{which}: {len(wrong)} numbers, the first at {wrong[0].tolist()}"


def near(actual: Tensor, expected: Tensor, which: str, *, roundings: int = 1) -> None:
    """Up to the last place, as often as it is rounded, or a hundred-thousandth of the largest."""
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(
        actual.float(),
        expected.to(actual.dtype).float(),
        rtol=roundings * LAST_PLACE[actual.dtype],
        atol=atol,
        msg=lambda said: f"{which}: {said}",
    )


# linears


def check_linears(C: int, O: int, dtype: torch.dtype, tokens: tuple[int, ...] = TOKENS) -> None:  # noqa: E741
    x = integers(sum(tokens), C, seed=0, dtype=dtype)
    weight, bias = integers(O, C, seed=1, dtype=dtype, unit=1 / 8), integers(O, seed=2, dtype=dtype)
    stored = weight.view(C, O)
    live = shared(x.float().abs(), tokens)[1] > 2.1
    wanted = (by_outputs(x, weight) + bias.float()).to(dtype)
    transposed = by_inputs(x, stored)
    skipping = (by_inputs(x * live, stored).to(dtype).float() + bias.float()).to(dtype)
    for which, _, own in each(weight.numel(), tokens):
        which = f"{C} to {O}, {which}"
        equal(sirius.linear(x[own], weight, bias), wanted[own], which)
        equal(sirius.linear(x[own], stored.t()), transposed[own].to(dtype), f"{which}, by inputs")
        y, counts = sirius.sparse_linear(x[own][None], stored, bias, 2.1)
        equal(y[0], skipping[own], f"{which}, sparse")
        assert counts.tolist() == [int(live[own][0].sum())]


@mostly_bfloat16
@pytest.mark.parametrize("shape", shapes.LINEARS, ids=str)
def test_linears_across_borders(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_linears(*shape, dtype)


@slow
@every_dtype
@every_model
def test_linears_of_models(model: Model, dtype: torch.dtype) -> None:
    for shape in dict.fromkeys(model.linears):
        check_linears(*shape, dtype)


@every_dtype
def test_several_linears_in_one_call(dtype: torch.dtype) -> None:
    """q, k and v, of which each ends within a task."""
    x, outputs = integers(sum(TOKENS), 290, seed=0, dtype=dtype), (129, 65, 1)
    weights = [integers(O, 290, seed=1 + O, dtype=dtype, unit=1 / 8) for O in outputs]  # noqa: E741
    wanted = [by_outputs(x, weight).to(dtype) for weight in weights]
    for which, _, own in each(290 * 129, TOKENS):
        for actual, expected in zip(
            sirius.linears(x[own], weights, [None] * 3), wanted, strict=True
        ):
            equal(actual, expected[own], which)


# MLPs


class Exact:
    """An MLP with relu, of which all is exact but the last sum, and its results in float32."""

    def __init__(self, C: int, I: int, dtype: torch.dtype, tokens: tuple[int, ...]) -> None:  # noqa: E741
        self.tokens, self.keep = tokens, max(1, I // 3)
        self.x = integers(sum(tokens), C, seed=0, dtype=dtype, unit=1 / 4)
        self.gate, self.up = (integers(I, C, seed=i, dtype=dtype, unit=1 / 8) for i in (1, 2))
        self.down = integers(
            I, C, seed=3, dtype=dtype, unit=1 / 512
        )  # no sum is infinite in float16
        self.args = [self.gate, self.up, self.down, None, None, None, "relu", 0]
        g = by_outputs(self.x, self.gate).relu().to(dtype).float()
        self.z = (g * by_outputs(self.x, self.up).to(dtype).float()).to(dtype).float()
        sums, means = (part.to(dtype).float() for part in shared(g, tokens))
        self.threshold = float(torch.tensor(float(means.median()), dtype=dtype))
        self.neurons = randn(I, seed=4).argsort()[: 2 * self.keep]
        first = sums.argsort(dim=1, descending=True, stable=True)[:, : self.keep]
        none = torch.zeros_like(g, dtype=torch.bool)
        self.largest = none.scatter(1, first, True)
        self.above = means > self.threshold
        self.chosen = none.index_fill(1, self.neurons, True)

    def y(self, kept: Tensor | None = None) -> Tensor:
        return by_inputs(self.z if kept is None else self.z * kept, self.down)


def check_mlps(C: int, I: int, dtype: torch.dtype, tokens: tuple[int, ...] = TOKENS) -> None:  # noqa: E741
    own_mlp = Exact(C, I, dtype, tokens)
    both = own_mlp.above & own_mlp.chosen
    dense, neurons = own_mlp.y(), own_mlp.neurons[None, None]
    activity = torch.nn.functional.normalize(own_mlp.z, dim=-1).square()
    skipping: list[tuple[str, tuple[Any, ...], Tensor]] = [
        ("topk_mlp", (own_mlp.keep,), own_mlp.largest),
        ("cats_mlp", (own_mlp.threshold,), own_mlp.above),
        ("griffin_mlp", (neurons,), own_mlp.chosen),
        ("griffin_cats_mlp", (neurons, own_mlp.threshold), both),
    ]
    wanted = [own_mlp.y(kept) for *_, kept in skipping]
    for which, count, own in each(own_mlp.gate.numel(), tokens):
        which = f"{C} and {I}, {which}"
        args = [own_mlp.x[own][None], *own_mlp.args]
        near(sirius.dense_mlp(*args)[0], dense[own], which)
        y, z = sirius.dense_mlp_activity(*args)
        near(y[0], dense[own], which)
        near(z[0], activity[own], f"{which}, activity")
        valid = torch.ones(1, count, dtype=torch.bool)
        _, statistic = sirius.dense_mlp_statistic(*args, valid)
        near(statistic[0], activity[own].sum(0), f"{which}, statistic")
        for (name, extra, kept), expected in zip(skipping, wanted, strict=True):
            result = getattr(sirius, name)(*args, *extra)
            y = result if isinstance(result, Tensor) else result[0]
            near(y[0], expected[own], f"{which}, {name}")
            if not isinstance(result, Tensor):
                assert result[1].tolist() == [int(kept[own][0].sum())], f"{which}, {name}"


@mostly_bfloat16
@pytest.mark.parametrize("shape", shapes.MLPS, ids=str)
def test_mlps_across_borders(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_mlps(*shape, dtype, (1, 3, 33) if shape is shapes.MLPS[0] else (1, 2, 3))


@slow
@every_dtype
@every_model
def test_mlps_of_models(model: Model, dtype: torch.dtype) -> None:
    check_mlps(model.hidden, model.neurons, dtype)


@slow
@every_dtype
@pytest.mark.parametrize("mixture", shapes.MIXTURES)
def test_mixtures(mixture: str, dtype: torch.dtype) -> None:
    """Four experts of one MLP's weights, of which each has half the one's before."""
    C, I = shapes.MIXTURES[mixture]  # noqa: E741
    tokens, E = (1, 2, 3, 8), 4
    one = Exact(C, I, dtype, tokens)
    x, scale = one.x, 0.5 ** torch.arange(E)
    gate, up, down = (
        torch.stack([tensor * float(s) for s in scale]) for tensor in (one.gate, one.up, one.down)
    )
    experts = randn(len(x), E, seed=5).argsort(-1)[:, :2].contiguous()
    weights = torch.tensor([[0.5, 0.25]]).expand(len(x), 2).contiguous()
    own_scale = scale[experts][..., None]
    g = by_outputs(x, one.gate).relu().to(dtype)[:, None] * own_scale.to(dtype)
    kept = largest(g, weights, I).bool()
    dense = one.y()[:, None] * own_scale**3 * weights[..., None]
    some = torch.stack([one.y(kept[:, place]) for place in (0, 1)], 1)
    ys = {
        "dense_moe": dense.sum(1),
        "topk_moe": (some * own_scale**3 * weights[..., None]).sum(1),
        "experts_moe": dense[:, 0],
    }
    extra = {"topk_moe": (I,), "experts_moe": (1, False)}
    for which, _, own in each(gate[0].numel(), tokens):
        args = [x[own], experts[own], weights[own], gate, up, down, None, None, None, "relu", 0]
        for name, expected in ys.items():
            y = getattr(sirius, name)(*args, *extra.get(name, ()))
            near(y, expected[own], f"{mixture}, {which}, {name}", roundings=2)


# attention


def tree(nodes: int) -> Tensor:
    """A mask [1, nodes, nodes] of a tree with chains and branches."""
    parents = [-1, *(node - 1 if node % 3 else node // 2 for node in range(1, nodes))]
    return naive.tree_mask(parents)[None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, history: int, mask: Tensor, window: int | None
) -> Tensor:
    """Attention of q [H, N, D] over k, v [G, history + N, D], in float32: [H, N, D]."""
    position = history + mask[0, :, 0]
    distance = torch.cat([position[:, None] - torch.arange(history), mask[0]], 1)
    seen = (distance >= 0) & (distance < (window or 1 << 30))
    k, v = (t.float().repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
    scores = q.float() @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def check_attention(
    H: int, G: int, D: int, dtype: torch.dtype, tokens: tuple[int, ...], histories: tuple[int, ...]
) -> None:
    """Two rows of the same history, of which the second one's queries are zero: its tokens see all
    slots alike, which is exact.
    """
    S, turn = max(histories) + max(tokens), 0
    for history in histories:
        for N in tokens:
            window, mask = (None, 70)[turn % 2], tree(N)
            q = randn(2, H, N, D, seed=turn, dtype=dtype)
            q[1] = 0
            k = randn(2, G, N, D, seed=1, dtype=dtype)
            v = integers(2, G, N, D, seed=2, dtype=dtype)
            caches = [randn(1, 2, G, S, D, seed=3, dtype=dtype)]
            caches.append(integers(1, 2, G, S, D, seed=4, dtype=dtype))
            for cache in caches:
                cache[..., history:, :] = torch.nan  # what is not in use
            length = torch.full((2,), history)
            at = length[:, None] + torch.arange(N)
            positions = (history + mask[:, :, 0]).expand(2, N)
            rest = [length, mask, 0, D**-0.5, window, None]
            keys, values = (
                torch.cat([cache[0, :, :, :history], new], 2)
                for cache, new in zip(caches, (k, v), strict=True)
            )
            wanted = [attend(q[b], keys[b], values[b], history, mask, window) for b in range(2)]
            for isa in instruction_sets():
                which = f"{H} heads over {G}, {N} after {history}, window {window}, {isa}"
                with using(isa), threads(THREADS[turn % 4]):
                    given = [cache.clone() for cache in caches]
                    y = sirius.cached_attention(q, k, v, *given, positions, at, *rest)
                    by_tokens = cached_attention_by_tokens(q, k, v, *given, positions, at, *rest)
                    blocks = [torch.full((1, 2, G, N, D), torch.nan).to(dtype) for _ in range(2)]
                    nodes = torch.arange(N)
                    apart = block_attention_(q, k, v, *caches, *blocks, positions, nodes, *rest)
                tolerance = ATTENTION[dtype]
                torch.testing.assert_close(
                    y[0].float(), wanted[0], rtol=tolerance, atol=3 * tolerance
                )
                near(y[1], wanted[1], which)
                equal(by_tokens, y, which)
                equal(apart, y, f"{which}, apart")
            turn += 1


@mostly_bfloat16
@pytest.mark.parametrize(("H", "G", "D"), [(9, 1, 33), (4, 2, 80)])
def test_attention_across_borders(H: int, G: int, D: int, dtype: torch.dtype) -> None:
    check_attention(H, G, D, dtype, (1, 3, 17), shapes.HISTORIES)


@slow
@every_dtype
@every_model
def test_attention_of_models(model: Model, dtype: torch.dtype) -> None:
    histories = (*shapes.HISTORIES, 1000)
    check_attention(model.heads, model.groups, model.head, dtype, TOKENS, histories)


# what lies between


def check_pointwise(model: Model, dtype: torch.dtype) -> None:
    C, H, D = model.hidden, model.heads, model.head
    x, more = (randn(sum(TOKENS), C, seed=i, dtype=dtype) for i in (0, 1))
    weight = randn(C, seed=2, dtype=dtype)
    heads = randn(1, sum(TOKENS), H * D, seed=3, dtype=dtype)
    cosine, sine = (randn(1, 1, sum(TOKENS), D, seed=i, dtype=dtype) for i in (4, 5))
    for which, count, own in each(0, TOKENS):
        total = x[own] + more[own]
        q = heads[:, own].view(1, count, H, D).transpose(1, 2)
        turned = [q, cosine[:, :, own], sine[:, :, own], D // 2]
        norm: Callable[[], Tensor] = lambda: pointwise.rms_norm(x[own], weight, 1e-6, dtype)  # noqa: B023,E731
        both = pointwise.add_norm(x[own], more[own], weight, 1e-6, dtype)
        actual = norm(), *both, pointwise.rotate(*turned)
        with references():
            expected = norm(), total, pointwise.rms_norm(total, weight, 1e-6, dtype)
            expected = *expected, pointwise.rotate(*turned)
        for has, needed in zip(actual, expected, strict=True):
            near(has, needed, f"{model.name}, {which}", roundings=2)


@every_dtype
def test_norms_and_rotations(dtype: torch.dtype) -> None:
    check_pointwise(MODELS[0], dtype)


@slow
@every_dtype
@every_model
def test_norms_and_rotations_of_models(model: Model, dtype: torch.dtype) -> None:
    check_pointwise(model, dtype)
