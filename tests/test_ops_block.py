"""`block_attention`: cached attention whose block stands apart, and which mutates nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sirius_runtime.ops.attention import decomposed_block_attention
from tests.support.operators import (
    CHAIN,
    DTYPES,
    LAYER,
    SLOTS,
    TREE,
    Block,
    assert_near,
    blocks,
    sirius,
)

LEVELS = [[0], [1, 2], [3, 4, 5], [6]]  # of TREE: parents stand in a part before
windows = st.none() | st.integers(1, 6)
softcaps = st.sampled_from([None, 0.7])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parents", [[-1], CHAIN, TREE], ids=["token", "chain", "tree"])
@pytest.mark.parametrize("lengths", [[0], [6], [3, 0, 11]], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, None), (4, 0.7), (None, 0.7)])
@pytest.mark.parametrize("sinks", [False, True])
def test_block_attention(
    sinks: bool,
    dtype: torch.dtype,
    parents: list[int],
    lengths: list[int],
    window: int | None,
    softcap: float | None,
) -> None:
    block = Block(lengths, [parents], dtype, sinks=sinks)
    actual = block.run_apart([range(len(parents))], window, softcap)
    assert_near(actual, block.expected(window, softcap))


@st.composite
def parts(draw: st.DrawFn, nodes: int) -> list[range]:
    """Nodes 0, 1, … cut anywhere: those before a part and in it are there, those after it not."""
    cuts = sorted(draw(st.sets(st.integers(1, nodes))) | {0, nodes})
    return [range(a, b) for a, b in pairwise(cuts)]


@settings(max_examples=60)
@given(blocks(), windows, softcaps, st.data())
def test_every_tree_in_any_number_of_calls(
    block: Block, window: int | None, softcap: float | None, data: st.DataObject
) -> None:
    calls = data.draw(parts(block.q.shape[2]))
    assert_near(block.run_apart(calls, window, softcap), block.expected(window, softcap))


@settings(max_examples=60)
@given(blocks(), windows, softcaps, st.data())
def test_it_equals_cached_attention_call_by_call(
    block: Block, window: int | None, softcap: float | None, data: st.DataObject
) -> None:
    calls = data.draw(parts(block.q.shape[2]))
    apart = block.run_apart(calls, window, softcap)  # first: the other overwrites its cache
    assert_near(apart, block.run_in_parts(calls, window, softcap))
    for new, cache in ((block.k_block, block.k_cache), (block.v_block, block.v_cache)):
        for row, length in enumerate(block.lengths):
            written = cache[LAYER, row, :, length : length + new.shape[3]]
            assert torch.equal(new[LAYER, row], written)


@settings(max_examples=60)
@given(blocks(), windows, softcaps)
def test_its_decomposition_is_the_same_function(
    block: Block, window: int | None, softcap: float | None
) -> None:
    args = block.apart(range(block.q.shape[2]), window, softcap)
    actual, expected = decomposed_block_attention(*args), sirius.block_attention(*args)
    assert_near(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[2], expected[2])


def test_its_decomposition_level_by_level() -> None:
    block = Block([3, 0, 11], [TREE])
    actual = block.run_apart(LEVELS, 4, operator=decomposed_block_attention)
    assert_near(actual, block.expected(4))


def test_the_history_may_fill_the_cache() -> None:
    """The block takes no slots of it."""
    block = Block([SLOTS, SLOTS - 1], [TREE])
    assert_near(block.run_apart(LEVELS), block.expected())


def test_rows_may_have_trees_of_their_own() -> None:
    block = Block([2, 5], [TREE, [-1, 0, 1, 2, 0, 4, 0]])
    assert_near(block.run_apart([range(len(TREE))]), block.expected())


def test_rows_may_share_a_mask() -> None:
    block = Block([2, 5], [TREE])
    assert block.mask.shape[0] == 1
    alike = Block([2, 5], [TREE, TREE])
    assert torch.equal(block.run_apart(LEVELS), alike.run_apart(LEVELS))


def test_nodes_not_yet_run_and_slots_from_length_on_are_never_seen() -> None:
    block, other = Block([3, 0], [TREE]), Block([3, 0], [TREE])
    for row, length in enumerate(other.lengths):
        other.k_cache[:, row, :, length:] *= -1
        other.v_cache[:, row, :, length:] *= -1
    other.k_block[:, :, :, 3:] *= -1
    other.v_block[:, :, :, 3:] *= -1
    assert torch.equal(block.run_apart(LEVELS[:2]), other.run_apart(LEVELS[:2]))


def test_it_returns_the_layer_s_block_with_the_call_s_nodes_in_place() -> None:
    block = Block([3, 0], [TREE])
    args = block.apart([1, 2])
    _, k_new, v_new = sirius.block_attention(*args)
    for new, old, run in ((k_new, block.k_block, block.k), (v_new, block.v_block, block.v)):
        wanted = old[LAYER].clone()
        wanted[:, :, 1:3] = run[:, :, 1:3]
        assert torch.equal(new, wanted)


def test_it_mutates_nothing() -> None:
    args = Block([3, 0, 11], [TREE]).apart([1, 2])
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    for new in sirius.block_attention(*args):
        new.fill_(7.0)  # nor do its results share memory with what it was given
    for arg, old in zip(args, before, strict=True):
        assert torch.equal(arg, old) if isinstance(arg, Tensor) else arg == old
