"""Attention without and with a cache, against the loops of `tests.support.naive`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import naive
from tests.support.operators import (
    CHAIN,
    DTYPES,
    LAYER,
    SLOTS,
    TREE,
    Block,
    assert_near,
    blocks,
    randn,
    sirius,
)

# attention without a cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 2, 9])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention(
    sinks: bool, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    q = randn(2, 6, 5, 3, seed=0, dtype=dtype)
    k = randn(2, 2, 5, 3, seed=1, dtype=dtype)
    v = randn(2, 2, 5, 4, seed=2, dtype=dtype)
    kind = window, softcap, randn(6, seed=3, dtype=dtype) if sinks else None
    actual = sirius.attention(q, k, v, 0, 0.4, *kind)
    assert_near(actual, naive.attention(q, k, v, 0.4, *kind))


def test_attention_of_one_token_is_its_value() -> None:
    q, k, v = randn(1, 2, 1, 3, seed=0), randn(1, 2, 1, 3, seed=1), randn(1, 2, 1, 5, seed=2)
    assert_near(sirius.attention(q, k, v, 0, 1.0, None, None), v)


def test_a_sink_is_a_token_without_a_value() -> None:
    """Of equal scores, the t-th token's output is t parts of t + 1; no sink is one of -inf."""
    q, k, v = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 1)
    kind = None, None, torch.tensor([0.0, -torch.inf])
    y = sirius.attention(q, k, v, 0, 1.0, *kind)[0, :, :, 0]
    torch.testing.assert_close(y, torch.tensor([[1 / 2, 2 / 3, 3 / 4], [1.0, 1.0, 1.0]]))


# attention with a cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parents", [[-1], CHAIN, TREE], ids=["token", "chain", "tree"])
@pytest.mark.parametrize("lengths", [[0], [6], [3, 0, 11]], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, None), (4, 0.7), (None, 0.7)])
@pytest.mark.parametrize("sinks", [False, True])
def test_cached_attention(
    sinks: bool,
    dtype: torch.dtype,
    parents: list[int],
    lengths: list[int],
    window: int | None,
    softcap: float | None,
) -> None:
    block = Block(lengths, [parents], dtype, sinks=sinks)
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
    one_by_one = [[node] for node in range(block.q.shape[2])]
    assert_near(block.run_in_parts(one_by_one, window, None), expected)
