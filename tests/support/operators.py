"""Arguments of the `sirius::` operators, and how near to `tests.support.naive` they must come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import sirius_runtime.operators  # noqa: F401  (registers the operators)
from tests.support import naive

sirius = torch.ops.sirius

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def assert_near(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


LAYERS, LAYER, HEADS, GROUPS, KEY, VALUE, SLOTS = 2, 1, 4, 2, 3, 5, 24

CHAIN = [-1, 0, 1, 2, 3]
TREE = [-1, 0, 0, 1, 1, 2, 5]


@dataclass
class Block:
    """A block of a tree's nodes after ragged histories, over caches full of large garbage."""

    lengths: list[int]
    parents: list[list[int]]  # one tree for all rows, or one a row
    dtype: torch.dtype = torch.float32
    seed: int = 0
    groups: int = GROUPS
    sinks: bool = False

    def __post_init__(self) -> None:
        rows, nodes = len(self.lengths), len(self.parents[0])

        def random(seed: int, *shape: int) -> Tensor:
            return randn(*shape, seed=10 * self.seed + seed, dtype=self.dtype)

        self.q = random(0, rows, HEADS, nodes, KEY)
        self.k = random(1, rows, self.groups, nodes, KEY)
        self.v = random(2, rows, self.groups, nodes, VALUE)
        self.k_cache = 20 * random(3, LAYERS, rows, self.groups, SLOTS, KEY)
        self.v_cache = 20 * random(4, LAYERS, rows, self.groups, SLOTS, VALUE)
        self.k_block = 20 * random(5, LAYERS, rows, self.groups, nodes, KEY)
        self.v_block = 20 * random(6, LAYERS, rows, self.groups, nodes, VALUE)
        for row, length in enumerate(self.lengths):
            self.k_cache[LAYER, row, :, :length] /= 20
            self.v_cache[LAYER, row, :, :length] /= 20
        self.sink = random(7, HEADS) if self.sinks else None
        self.length = torch.tensor(self.lengths)
        self.mask = torch.stack([naive.tree_mask(tree) for tree in self.parents])
        self.slots = self.length[:, None] + torch.arange(nodes)
        self.positions = self.length[:, None] + self.mask[:, :, 0]

    def cached(self, nodes: Sequence[int], window: int | None, softcap: float | None) -> Tensor:
        """`cached_attention` of these nodes."""
        part = list(nodes)
        return sirius.cached_attention(
            self.q[:, :, part],
            self.k[:, :, part],
            self.v[:, :, part],
            self.k_cache,
            self.v_cache,
            self.positions[:, part],
            self.slots[:, part],
            self.length,
            self.mask[:, part],
            LAYER,
            0.4,
            window,
            softcap,
            self.sink,
        )

    def apart(
        self, nodes: Sequence[int], window: int | None = None, softcap: float | None = None
    ) -> tuple[Any, ...]:
        """The arguments of `block_attention` for these nodes."""
        part = list(nodes)
        return (
            self.q[:, :, part],
            self.k[:, :, part],
            self.v[:, :, part],
            self.k_cache,
            self.v_cache,
            self.k_block,
            self.v_block,
            self.positions[:, part],
            torch.tensor(part),
            self.length,
            self.mask[:, part],
            LAYER,
            0.4,
            window,
            softcap,
            self.sink,
        )

    def run(self, window: int | None = None, softcap: float | None = None) -> Tensor:
        """`cached_attention` of all nodes in one call."""
        return self.cached(range(self.q.shape[2]), window, softcap)

    def run_in_parts(
        self, parts: Sequence[Sequence[int]], window: int | None, softcap: float | None
    ) -> Tensor:
        """`cached_attention` of a part of the nodes a call, in order."""
        return torch.cat([self.cached(part, window, softcap) for part in parts], 2)

    def run_apart(
        self,
        parts: Sequence[Sequence[int]],
        window: int | None = None,
        softcap: float | None = None,
        operator: Callable[..., Any] = sirius.block_attention,
    ) -> Tensor:
        """`block_attention` of a part of the nodes a call, in order; each carries the block on."""
        outputs = []
        for part in parts:
            output, k_new, v_new = operator(*self.apart(part, window, softcap))
            self.k_block, self.v_block = self.k_block.clone(), self.v_block.clone()
            self.k_block[LAYER], self.v_block[LAYER] = k_new, v_new
            outputs.append(output)
        return torch.cat(outputs, 2)

    def expected(self, window: int | None = None, softcap: float | None = None) -> Tensor:
        rows = []
        for row, length in enumerate(self.lengths):
            history_k, history_v = (
                cache[LAYER, row, :, :length] for cache in (self.k_cache, self.v_cache)
            )
            tree = self.parents[row % len(self.parents)]
            block = self.q[row], self.k[row], self.v[row], history_k, history_v
            rows.append(naive.tree_attention(*block, tree, 0.4, window, softcap, self.sink))
        return torch.stack(rows)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Any tree after any histories."""
    nodes = draw(st.integers(1, 8))
    tree = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, nodes))]
    lengths = draw(st.lists(st.integers(0, SLOTS - nodes), min_size=1, max_size=3))
    groups = draw(st.sampled_from([1, 2, 4]))
    seed, sinks = draw(st.integers(0, 9)), draw(st.booleans())
    return Block(lengths, [tree], seed=seed, groups=groups, sinks=sinks)


ROWS, TOKENS, HIDDEN, NEURONS = 2, 3, 5, 13
NO_NEAR_TIES = 490  # a seed of which a test says that no rounding decides its choices of neurons


def mlp_args(
    act: str = "silu",
    dtype: torch.dtype = torch.float32,
    *,
    tokens: int = TOKENS,
    bias: bool = False,
    distinct: bool = False,
) -> list[Any]:
    """x, the three weights and biases, the activation and the layer.

    `distinct`: each token's gate products are the integers from -4, in an order of its own: exact
    in every dtype, so that rounding decides no choice of neurons.
    """
    x = randn(ROWS, TOKENS, HIDDEN, seed=0, dtype=dtype)
    gate, up, down = (randn(NEURONS, HIDDEN, seed=i, dtype=dtype) / 2 for i in (1, 2, 3))
    if distinct:
        generator = torch.Generator().manual_seed(NO_NEAR_TIES)
        column = torch.randint(HIDDEN, (ROWS, TOKENS), generator=generator)
        x = torch.nn.functional.one_hot(column, HIDDEN).to(dtype)
        shuffled = randn(NEURONS, HIDDEN, seed=NO_NEAR_TIES).argsort(0)
        gate = (shuffled - 4).to(dtype)
    sizes = (NEURONS, NEURONS, HIDDEN)
    biases = [randn(n, seed=4 + i, dtype=dtype) if bias else None for i, n in enumerate(sizes)]
    return [x[:, :tokens], gate, up, down, *biases, act, 1]


CHANNELS, FEATURES = 7, 4


def linear_args(
    dtype: torch.dtype = torch.float32,
    *,
    tokens: int = TOKENS,
    bias: bool = True,
) -> list[Any]:
    """x, the weight and the bias; |x| are multiples of 1/4, below 3."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-11, 12, (ROWS, TOKENS, CHANNELS), generator=generator).to(dtype) / 4
    weight = randn(CHANNELS, FEATURES, seed=1, dtype=dtype)
    return [
        x[:, :tokens],
        weight,
        randn(FEATURES, seed=2, dtype=dtype) if bias else None,
    ]


EXPERTS, ROUTED = 5, 3


def moe_args(
    act: str = "silu",
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    plain: bool = False,
) -> list[Any]:
    """x of 4 tokens, their experts and weights, the weights and biases of all experts, the
    activation and the layer. `plain`: no up.
    """
    x = randn(4, HIDDEN, seed=0, dtype=dtype)
    scores = randn(4, EXPERTS, seed=1).softmax(-1)
    weights, experts = scores.topk(ROUTED)
    gate, up, down = (randn(EXPERTS, NEURONS, HIDDEN, seed=i, dtype=dtype) / 2 for i in (2, 3, 4))
    sizes = (NEURONS, NEURONS, HIDDEN)
    biases = [
        randn(EXPERTS, n, seed=5 + i, dtype=dtype) if bias else None for i, n in enumerate(sizes)
    ]
    if plain:
        return [x, experts, weights, gate, None, down, biases[0], None, biases[2], act, 1]
    return [x, experts, weights, gate, up, down, *biases, act, 1]
