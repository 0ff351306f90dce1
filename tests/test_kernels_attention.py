"""The CPU kernel of cached attention: against loops, bit for bit, and where it does not serve."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sirius_runtime.kernels.attention import cached_attention_by_tokens
from sirius_runtime.kernels.build import InstructionSet, instruction_sets
from sirius_runtime.kernels.native import references, using
from tests.support.kernels import SETS, Fallback, forbid_references, require
from tests.support.operators import CHAIN, LAYER, TREE, Block, blocks, randn, sirius

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[InstructionSet]:
    require(request.param)
    with using(request.param):
        yield request.param


@pytest.fixture
def only_kernels(isa: InstructionSet, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_references(monkeypatch)


@pytest.fixture
def best(monkeypatch: pytest.MonkeyPatch) -> None:
    require(InstructionSet.PORTABLE)
    forbid_references(monkeypatch)


def near(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parents", [[-1], CHAIN, TREE], ids=["token", "chain", "tree"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, None), (4, 0.7)])
def test_it_is_tree_attention(
    dtype: torch.dtype, parents: list[int], window: int | None, softcap: float | None
) -> None:
    block = Block([3, 0, 11], [parents], dtype)
    near(block.run(window, softcap), block.expected(window, softcap))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("best")
@given(blocks(), st.none() | st.integers(1, 6))
def test_every_tree(block: Block, window: int | None) -> None:
    near(block.run(window), block.expected(window))


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, None), (4, 0.7)])
def test_a_block_that_stands_apart_is_the_same_to_the_bit(
    dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    whole = Block([3, 0, 11], [TREE], dtype).run(window, softcap)
    near(whole, Block([3, 0, 11], [TREE], dtype).expected(window, softcap))
    for parts in ([range(7)], [[0], [1, 2], [3, 4, 5, 6]]):
        apart = Block([3, 0, 11], [TREE], dtype)
        assert torch.equal(apart.run_apart(parts, window, softcap), whole)
        assert torch.equal(apart.k_block[LAYER], apart.k)  # the call's own K/V are in place


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("best")
@given(blocks(), st.none() | st.integers(1, 6))
def test_every_tree_that_stands_apart(block: Block, window: int | None) -> None:
    near(block.run_apart([range(block.q.shape[2])], window), block.expected(window))


def long_arguments(dtype: torch.dtype, tokens: int) -> list[object]:
    """A chain after histories that fill some blocks of slots and a part of one more."""
    B, H, G, S, D, V = 2, 6, 2, 300, 20, 36
    length = torch.tensor([201, 128])
    index = torch.arange(tokens)
    at = length[:, None] + index
    distance = (index[:, None] - index).clamp(min=-1)[None]
    q = randn(B, H, tokens, D, seed=0, dtype=dtype)
    k, v = randn(B, G, tokens, D, seed=1, dtype=dtype), randn(B, G, tokens, V, seed=2, dtype=dtype)
    caches = [randn(2, B, G, S, n, seed=3, dtype=dtype) for n in (D, V)]
    return [q, k, v, *caches, at, at, length, distance, 1, 0.2]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("sinks", [False, True])
def test_histories_of_several_blocks(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int | None, sinks: bool
) -> None:
    args = long_arguments(dtype, 9)
    last = window, None, 2 * randn(6, seed=4, dtype=dtype) if sinks else None
    with references():
        expected = sirius.cached_attention(*args, *last)
    forbid_references(monkeypatch)
    near(sirius.cached_attention(*args, *last), expected)


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_alone_and_in_a_chain_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    q, k, v, k_cache, v_cache, at, _, length, _, *rest = long_arguments(dtype, 9)
    together = sirius.cached_attention(*long_arguments(dtype, 9), None, None)
    zero = torch.zeros(1, 1, 1, dtype=torch.int64)
    for t in range(9):
        part = (tensor[:, :, t : t + 1] for tensor in (q, k, v))
        here = at[:, t : t + 1]
        alone = sirius.cached_attention(
            *part, k_cache, v_cache, here, here, length + t, zero, *rest, None, None
        )
        assert torch.equal(alone[:, :, 0], together[:, :, t])


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "groups", "size"), [(3, 3, 5), (20, 1, 33), (8, 2, 66)])
def test_heads_that_share_keys_and_odd_sizes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, heads: int, groups: int, size: int
) -> None:
    """From one query in a vector to more than one vector's; keys that end in half a pair."""
    tokens, slots = 18, 90
    length = torch.tensor([64 + 3])
    index = torch.arange(tokens)
    at, distance = length[:, None] + index, (index[:, None] - index).clamp(min=-1)[None]
    q = randn(1, heads, tokens, size, seed=0, dtype=dtype)
    k, v = (randn(1, groups, tokens, size, seed=i, dtype=dtype) for i in (1, 2))
    caches = [randn(1, 1, groups, slots, size, seed=i, dtype=dtype) for i in (3, 4)]
    caches[0][..., 67 + tokens :, :] = float("nan")  # beyond what is in use
    args = [q, k, v, *caches, at, at, length, distance, 0, size**-0.5, None, None]
    actual = sirius.cached_attention(*args)
    monkeypatch.undo()
    with references():
        near(actual, sirius.cached_attention(*args))


@pytest.mark.usefixtures("best")
def test_by_tokens_only_the_memory_is_another() -> None:
    args = [*long_arguments(torch.float32, 9), None, None]
    plain, by_tokens = sirius.cached_attention(*args), cached_attention_by_tokens(*args)
    assert torch.equal(by_tokens, plain)
    assert by_tokens.transpose(1, 2).is_contiguous()
    with references(), pytest.raises(Fallback):
        cached_attention_by_tokens(*args)


@pytest.mark.usefixtures("best")
def test_a_slot_that_is_not_there_is_refused() -> None:
    args = long_arguments(torch.float32, 2)
    args[6] = torch.full((2, 2), 300)
    with pytest.raises(IndexError, match="cached_attention"):
        sirius.cached_attention(*args, None, None)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 70])
def test_a_prompt(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int | None) -> None:
    """Of more tokens than a block has slots: there are blocks that none of a task's tokens sees."""
    q, k, v, *caches, at, _, length, distance, layer, scale = long_arguments(dtype, 80)
    at, length = at - 120, length - 120  # 81 and 8 before
    args = [q, k, v, *caches, at, at, length, distance, layer, scale, window, None]
    with references():
        expected = sirius.cached_attention(*args)
    forbid_references(monkeypatch)
    near(sirius.cached_attention(*args), expected)


@pytest.mark.usefixtures("best")
def test_other_types_are_left_to_the_reference() -> None:
    args = long_arguments(torch.float32, 2)
    sirius.cached_attention(*args, None, None, torch.zeros(6))
    with pytest.raises(Fallback):
        sirius.cached_attention(*args, None, None, torch.zeros(6).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_no_token_sees_may_be_no_number(dtype: torch.dtype) -> None:
    """A chain of room for 16 tokens whose third is drafted: behind it lies whatever was refused."""
    require(InstructionSet.PORTABLE)
    history, room, H, G, D = 70, 16, 4, 2, 33
    q = randn(1, H, 1, D, seed=0, dtype=dtype)
    k, v = (randn(1, G, 1, D, seed=i, dtype=dtype) for i in (1, 2))
    caches = [randn(1, 1, G, history + room, D, seed=i, dtype=dtype) for i in (3, 4)]
    mask = torch.full((1, 1, room), -1)
    mask[0, 0, :3] = torch.tensor([2, 1, 0])
    at, length = torch.tensor([[history + 2]]), torch.tensor([history])

    def attend(room: int) -> Tensor:
        given = [cache.clone() for cache in caches]
        args = [q, k, v, *given, at, at, length, mask[..., :room], 0, D**-0.5, None, None]
        return sirius.cached_attention(*args)

    wanted = [attend(3)]
    with references():
        wanted.append(attend(3))
    for cache in caches:
        cache[..., history + 3 :, :] = torch.nan
    for isa in instruction_sets():
        with using(isa):
            near(attend(room), wanted[0])
    with references():
        near(attend(room), wanted[1])
