"""Each `sirius::` operator against loops that say what it means (`tests.support.naive`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sirius_runtime.ops  # noqa: F401  (registers the operators)
from sirius_runtime.ops.mlp import ACTIVATIONS
from tests.support import naive

sirius = torch.ops.sirius

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def assert_near(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# attention without a cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 2, 9])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_attention(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    q = randn(2, 6, 5, 3, seed=0, dtype=dtype)
    k = randn(2, 2, 5, 3, seed=1, dtype=dtype)
    v = randn(2, 2, 5, 4, seed=2, dtype=dtype)
    actual = sirius.attention(q, k, v, 0, 0.4, window, softcap)
    assert_near(actual, naive.attention(q, k, v, 0.4, window, softcap))


def test_attention_of_one_token_is_its_value() -> None:
    q, k, v = randn(1, 2, 1, 3, seed=0), randn(1, 2, 1, 3, seed=1), randn(1, 2, 1, 5, seed=2)
    assert_near(sirius.attention(q, k, v, 0, 1.0, None, None), v)


# attention with a cache

LAYERS, LAYER, HEADS, GROUPS, KEY, VALUE, SLOTS = 2, 1, 4, 2, 3, 5, 24


@dataclass
class Block:
    """A block of a tree's nodes after ragged histories, over caches full of large garbage."""

    lengths: list[int]
    parents: list[list[int]]  # one tree for all rows, or one a row
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        rows, nodes = len(self.lengths), len(self.parents[0])

        def random(seed: int, *shape: int) -> Tensor:
            return randn(*shape, seed=10 * self.seed + seed, dtype=self.dtype)

        self.q = random(0, rows, HEADS, nodes, KEY)
        self.k = random(1, rows, GROUPS, nodes, KEY)
        self.v = random(2, rows, GROUPS, nodes, VALUE)
        self.k_cache = 20 * random(3, LAYERS, rows, GROUPS, SLOTS, KEY)
        self.v_cache = 20 * random(4, LAYERS, rows, GROUPS, SLOTS, VALUE)
        for row, length in enumerate(self.lengths):
            self.k_cache[LAYER, row, :, :length] /= 20
            self.v_cache[LAYER, row, :, :length] /= 20
        self.length = torch.tensor(self.lengths)
        self.mask = torch.stack([naive.tree_mask(tree) for tree in self.parents])
        self.slots = self.length[:, None] + torch.arange(nodes)
        self.positions = self.length[:, None] + self.mask[:, :, 0]

    def run(self, window: int | None = None, softcap: float | None = None) -> Tensor:
        """All nodes in one call."""
        return self._call(slice(None), window, softcap)

    def run_one_by_one(self, window: int | None = None, softcap: float | None = None) -> Tensor:
        """A call a node, in order, each with its row of the mask."""
        nodes = range(self.q.shape[2])
        return torch.cat([self._call(slice(i, i + 1), window, softcap) for i in nodes], 2)

    def _call(self, part: slice, window: int | None, softcap: float | None) -> Tensor:
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
        )

    def expected(self, window: int | None = None, softcap: float | None = None) -> Tensor:
        rows = []
        for row, length in enumerate(self.lengths):
            history_k, history_v = (
                cache[LAYER, row, :, :length] for cache in (self.k_cache, self.v_cache)
            )
            tree = self.parents[row % len(self.parents)]
            block = self.q[row], self.k[row], self.v[row], history_k, history_v
            rows.append(naive.tree_attention(*block, tree, 0.4, window, softcap))
        return torch.stack(rows)


CHAIN = [-1, 0, 1, 2, 3]
TREE = [-1, 0, 0, 1, 1, 2, 5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parents", [[-1], CHAIN, TREE], ids=["token", "chain", "tree"])
@pytest.mark.parametrize("lengths", [[0], [6], [3, 0, 11]], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, None), (4, 0.7), (None, 0.7)])
def test_cached_attention(
    dtype: torch.dtype,
    parents: list[int],
    lengths: list[int],
    window: int | None,
    softcap: float | None,
) -> None:
    block = Block(lengths, [parents], dtype)
    expected = block.expected(window, softcap)
    assert_near(block.run(window, softcap), expected)


def test_the_block_may_end_at_the_last_slot() -> None:
    block = Block([SLOTS - len(TREE), 0], [TREE])
    assert_near(block.run(), block.expected())


def test_a_chain_after_no_history_is_attention_without_a_cache() -> None:
    block = Block([0, 0], [CHAIN])
    cacheless = sirius.attention(block.q, block.k, block.v, LAYER, 0.4, 3, None)
    assert_near(block.run(window=3), cacheless)


def test_keys_and_values_are_written_to_their_slots_and_nowhere_else() -> None:
    block = Block([3, 0, 11], [TREE])
    for cache, new in ((block.k_cache, block.k), (block.v_cache, block.v)):
        wanted = cache.clone()
        for row, length in enumerate(block.lengths):
            wanted[LAYER, row, :, length : length + len(TREE)] = new[row]
        block.run()
        torch.testing.assert_close(cache, wanted, rtol=0, atol=0)


def test_rows_may_have_trees_of_their_own() -> None:
    block = Block([2, 5], [TREE, [-1, 0, 1, 2, 0, 4, 0]])
    assert_near(block.run(), block.expected())


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    nodes = draw(st.integers(1, 8))
    tree = [-1, *(draw(st.integers(0, node - 1)) for node in range(1, nodes))]
    lengths = draw(st.lists(st.integers(0, SLOTS - nodes), min_size=1, max_size=3))
    return Block(lengths, [tree], seed=draw(st.integers(0, 9)))


windows = st.none() | st.integers(1, 6)


@settings(max_examples=60)
@given(blocks(), windows)
def test_every_tree(block: Block, window: int | None) -> None:
    expected = block.expected(window)
    assert_near(block.run(window), expected)


@settings(max_examples=60)
@given(blocks(), windows)
def test_a_tree_node_by_node_equals_the_tree_at_once(block: Block, window: int | None) -> None:
    expected = block.expected(window)
    assert_near(block.run_one_by_one(window), expected)


# gated MLPs

ROWS, TOKENS, HIDDEN, NEURONS = 2, 3, 5, 13


def mlp_args(
    act: str = "silu",
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    distinct: bool = False,
) -> list[Any]:
    """x, the three weights and biases, the activation and the layer.

    `distinct`: each token's gate products are the integers from -4, shuffled: exact in every dtype,
    so that rounding decides no choice of neurons.
    """
    x = randn(ROWS, TOKENS, HIDDEN, seed=0, dtype=dtype)
    gate, up, down = (randn(NEURONS, HIDDEN, seed=i, dtype=dtype) / 2 for i in (1, 2, 3))
    if distinct:
        column = torch.randint(HIDDEN, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
        x = torch.nn.functional.one_hot(column, HIDDEN).to(dtype)
        shuffled = randn(NEURONS, HIDDEN, seed=1).argsort(0)
        gate = (shuffled - 4).to(dtype)
    sizes = (NEURONS, NEURONS, HIDDEN)
    biases = [randn(n, seed=4 + i, dtype=dtype) if bias else None for i, n in enumerate(sizes)]
    return [x, gate, up, down, *biases, act, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gated_mlp(act: str, bias: bool, dtype: torch.dtype) -> None:
    args = mlp_args(act, dtype, bias=bias)
    assert_near(sirius.gated_mlp(*args), naive.gated_mlp(*args))


def test_every_activation_has_a_naive_form() -> None:
    assert naive.ACTIVATIONS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_gated_mlp_statistic_counts_valid_tokens_only(bias: bool, dtype: torch.dtype) -> None:
    args = mlp_args(dtype=dtype, bias=bias)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    y, statistic = sirius.gated_mlp_statistic(*args, valid)
    wanted_y, wanted = naive.gated_mlp_statistic(*args, valid)
    assert_near(y, wanted_y)
    assert statistic.dtype is torch.float32
    torch.testing.assert_close(statistic, wanted, rtol=0, atol=TOLERANCE[dtype])
    assert statistic[1].count_nonzero() == 0


def test_each_token_adds_one_to_the_statistic_over_neurons() -> None:
    args = mlp_args()
    _, statistic = sirius.gated_mlp_statistic(*args, torch.ones(ROWS, TOKENS).bool())
    torch.testing.assert_close(statistic.sum(1), torch.full((ROWS,), float(TOKENS)))


def test_statistics_of_chunks_add_up() -> None:
    x, *rest = mlp_args()
    valid = torch.ones(ROWS, TOKENS).bool()
    _, whole = sirius.gated_mlp_statistic(x, *rest, valid)
    _, first = sirius.gated_mlp_statistic(x[:, :1], *rest, valid[:, :1])
    _, second = sirius.gated_mlp_statistic(x[:, 1:], *rest, valid[:, 1:])
    torch.testing.assert_close(first + second, whole)


def test_a_token_without_any_activation_adds_nothing_to_the_statistic() -> None:
    x, *rest = mlp_args()
    _, statistic = sirius.gated_mlp_statistic(
        torch.zeros_like(x), *rest, torch.ones(ROWS, TOKENS).bool()
    )
    assert statistic.count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_topk_mlp_at_odd_sizes(act: str, bias: bool, dtype: torch.dtype) -> None:
    args = mlp_args(act, dtype, bias=bias, distinct=True)
    args[4] = None  # a gate bias would make near-ties
    for keep in (1, 7, 10):  # the last are negative
        assert_near(sirius.topk_mlp(*args, keep), naive.topk_mlp(*args, keep))


def test_topk_mlp_chooses_by_magnitude_with_a_gate_bias() -> None:
    args = mlp_args(bias=True)
    assert_near(sirius.topk_mlp(*args, 4), naive.topk_mlp(*args, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_mlp_of_all_neurons_is_dense(dtype: torch.dtype) -> None:
    args = mlp_args(dtype=dtype, bias=True)
    torch.testing.assert_close(
        sirius.topk_mlp(*args, NEURONS), sirius.gated_mlp(*args), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.25, 5.5, 100.0])
@pytest.mark.parametrize("bias", [False, True])
def test_cats_mlp(threshold: float, bias: bool, dtype: torch.dtype) -> None:
    args = mlp_args("silu", dtype, bias=bias, distinct=True)
    args[4] = None
    y, counts = sirius.cats_mlp(*args, threshold)
    wanted_y, wanted = naive.cats_mlp(*args, threshold)
    assert_near(y, wanted_y)
    assert torch.equal(counts, wanted)


def test_cats_mlp_keeps_what_is_above_the_threshold_not_at_it() -> None:
    args = mlp_args("relu", distinct=True)  # activations 0 (5 of them), 1, 2, … 8
    _, counts = sirius.cats_mlp(*args, 3.0)
    assert counts.unique().tolist() == [5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_griffin_mlp_uses_the_row_s_own_neurons_of_its_layer(
    bias: bool, dtype: torch.dtype
) -> None:
    args = mlp_args(dtype=dtype, bias=bias)
    order = randn(2, ROWS, NEURONS, seed=9).argsort(-1)  # of 2 layers; the arguments are layer 1's
    for keep in (1, 6, NEURONS):
        neurons = order[..., :keep]
        assert_near(sirius.griffin_mlp(*args, neurons), naive.griffin_mlp(*args, neurons))


# registration: schemas tell the truth about mutation, fakes about shapes


def samples() -> dict[str, tuple[Any, ...]]:
    mlp = tuple(mlp_args(bias=True))
    block = Block([3, 0], [TREE])
    qkv = block.q, block.k, block.v
    where = block.positions, block.slots, block.length, block.mask
    valid = torch.ones(ROWS, TOKENS).bool()
    neurons = torch.arange(4).expand(2, ROWS, 4).contiguous()
    return {
        "attention": (*qkv, 0, 0.4, 3, 0.7),
        "cached_attention": (*qkv, block.k_cache, block.v_cache, *where, LAYER, 0.4, None, None),
        "gated_mlp": mlp,
        "gated_mlp_statistic": (*mlp, valid),
        "topk_mlp": (*mlp, 4),
        "cats_mlp": (*mlp, 0.1),
        "griffin_mlp": (*mlp, neurons),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(
        getattr(sirius, name).default,
        samples()[name],
        test_utils=("test_schema", "test_faketensor"),
    )


def test_every_operator_is_checked() -> None:
    registered = {
        name.removeprefix("sirius::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("sirius::")
    }
    assert registered == samples().keys()
