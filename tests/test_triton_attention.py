"""The CUDA kernels of attention, in Triton's interpreter: against loops and references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_runtime.kernels.native import references
from tests.support.fast import gate_but, slow_but
from tests.support.operators import CHAIN, LAYER, TREE, Block, randn, sirius
from tests.support.triton_interpreter import interpreting, require_triton, small_tiles

require_triton()

from sirius_runtime.kernels.cuda import attention, tiles  # noqa: E402  (it imports Triton)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    with interpreting():
        yield


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    monkeypatch.setattr(tiles, "attention_parts", lambda *_: 4)


def near(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None, "the kernel did not serve"
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def cached(
    block: Block,
    window: int | None = None,
    softcap: float | None = None,
    length: Tensor | None = None,
) -> Tensor | None:
    """`cached_attention` of all nodes by the kernels."""
    return attention.cached_attention(
        *(block.q, block.k, block.v, block.k_cache, block.v_cache, block.positions, block.slots),
        *(block.length if length is None else length, block.mask, LAYER, 0.4, window, softcap),
        block.sink,
    )


KINDS = [(None, None, False), (2, None, True), (4, 0.7, False), (None, 0.7, True)]


SHAPES = [
    *((TREE, *kind) for kind in KINDS),
    ([-1], None, None, False),
    ([-1], 2, None, True),
    (CHAIN, 3, 0.7, True),
]


@pytest.mark.parametrize(
    ("dtype", "parents", "window", "softcap", "sinks"),
    slow_but(
        ((dtype, *shape) for dtype in DTYPES for shape in SHAPES),
        [
            *((torch.float32, *shape) for shape in (SHAPES[1], SHAPES[2])),
            (torch.bfloat16, *SHAPES[0]),
        ],
        [
            *((torch.float32, *shape) for shape in (SHAPES[0], *SHAPES[3:])),
            (torch.float16, *SHAPES[0]),
        ],
    ),
)
def test_it_is_tree_attention(
    dtype: torch.dtype, parents: list[int], window: int | None, softcap: float | None, sinks: bool
) -> None:
    block = Block([3, 0, 11], [parents], dtype, sinks=sinks)
    near(cached(block, window, softcap), block.expected(window, softcap))
    for row, length in enumerate(block.lengths):  # the call's own K/V are in their slots
        own = slice(length, length + len(parents))
        assert torch.equal(block.k_cache[LAYER, row, :, own], block.k[row])
        assert torch.equal(block.v_cache[LAYER, row, :, own], block.v[row])


@pytest.mark.parametrize("groups", gate_but((1, 4), {1}))
def test_heads_that_share(groups: int) -> None:
    block = Block([20, 1], [TREE[:4]], groups=groups)
    near(cached(block), block.expected())


def test_a_tree_for_each_row() -> None:
    block = Block([3, 0], [[-1, 0, 0], [-1, 0, 1]])
    near(cached(block, 3), block.expected(3))


@pytest.mark.parametrize(
    ("dtype", "window", "softcap", "sinks"),
    slow_but(
        ((dtype, *kind) for dtype in DTYPES for kind in KINDS[:3:2]),
        [(DTYPES[0], *KINDS[2])],
    ),
)
def test_a_block_that_stands_apart(
    dtype: torch.dtype, window: int | None, softcap: float | None, sinks: bool
) -> None:
    apart = Block([3, 11], [TREE], dtype, sinks=sinks)
    expected = apart.expected(window, softcap)

    def kernels(*args: Any) -> Any:
        done = attention.block_attention(*args)
        assert done is not None
        return done

    near(apart.run_apart([[0], [1, 2], [3, 4, 5, 6]], window, softcap, kernels), expected)
    assert torch.equal(apart.k_block[LAYER], apart.k)  # the calls' own K/V are in place
    near(apart.run_apart([range(7)], window, softcap, kernels), expected)


def long_arguments(dtype: torch.dtype, tokens: int) -> list[Any]:
    """A chain after histories of several tiles and a part of one more; S is none of a tile."""
    B, H, G, S, D, V = 2, 6, 2, 219, 20, 36
    length = torch.tensor([201, 128])
    index = torch.arange(tokens)
    at = length[:, None] + index
    distance = (index[:, None] - index).clamp(min=-1)[None]
    # As projections give them: heads are a dimension of a token's vector.
    q, k, v = (
        randn(B, tokens, n, d, seed=i, dtype=dtype).transpose(1, 2)
        for i, (n, d) in enumerate(((H, D), (G, D), (G, V)))
    )
    caches = [randn(2, B, G, S, n, seed=3, dtype=dtype) for n in (D, V)]
    return [q, k, v, *caches, at, at, length, distance, 1, 0.2]


@pytest.mark.parametrize(
    ("dtype", "window", "sinks"),
    slow_but(
        ((dtype, *kind) for dtype in DTYPES for kind in ((None, False), (70, True))),
        {(torch.float32, 70, True)},
    ),
)
def test_histories_of_several_tiles(dtype: torch.dtype, window: int | None, sinks: bool) -> None:
    last = window, None, 2 * randn(6, seed=4, dtype=dtype) if sinks else None
    with references():
        expected = sirius.cached_attention(*long_arguments(dtype, 9), *last)
    near(attention.cached_attention(*long_arguments(dtype, 9), *last), expected)


@pytest.mark.gate
def test_more_queries_than_a_tile() -> None:
    args = long_arguments(torch.float32, 18)  # 54 of a key/value head, in tiles of 16
    with references():
        expected = sirius.cached_attention(*long_arguments(torch.float32, 18), None, None)
    near(attention.cached_attention(*args, None, None), expected)


def test_slots_that_nobody_sees_are_not_read() -> None:
    """They hold nothing but NaN: past the block, before the window, and of other layers."""
    args = long_arguments(torch.float32, 3)
    with references():
        expected = sirius.cached_attention(*long_arguments(torch.float32, 3), 40, None)
    for cache in args[3:5]:
        cache[0] = float("nan")
        for row, length in enumerate((201, 128)):
            cache[1, row, :, length + 3 :] = float("nan")
            cache[1, row, :, : (length - 39) // 16 * 16] = float("nan")
    near(attention.cached_attention(*args, 40, None), expected)


def test_a_slot_that_is_not_there_is_left_out() -> None:
    args = long_arguments(torch.float32, 2)
    args[6] = torch.tensor([[201, 219], [-1, 129]])
    before = [cache.clone() for cache in args[3:5]]
    assert attention.cached_attention(*args, None, None) is not None
    for cache, old, new in zip(args[3:5], before, args[1:3], strict=True):
        old[1, 0, :, 201] = new[0, :, 0]
        old[1, 1, :, 129] = new[1, :, 1]
        assert torch.equal(cache, old)


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    block = Block([0, 0], [[-1, 0]])
    block.mask = torch.tensor([[[-1, -1], [1, 0]]])
    out = cached(block)
    assert out is not None
    assert not out[:, :, 0].any()
    assert out[:, :, 1].isfinite().all()


def test_a_cache_that_is_full() -> None:
    """What a mask has beyond the cache is not there: the next layer, all NaN, follows it."""

    def arguments() -> list[Any]:
        args = long_arguments(torch.float32, 2)
        args[7] = torch.tensor([100, 217])  # of 219 slots
        args[5] = args[6] = args[7][:, None] + torch.arange(2)
        args[8] = torch.nn.functional.pad(args[8], (0, 4), value=-1)
        args[9] = 0
        for cache in args[3:5]:
            cache[1] = float("nan")
        return args

    with references():
        expected = sirius.cached_attention(*arguments(), None, None)
    near(attention.cached_attention(*arguments(), None, None), expected)


def test_what_is_left_to_the_reference() -> None:
    most = tiles.MOST_QUERIES
    plain = None, None
    assert attention.cached_attention(*long_arguments(torch.float32, most + 1), *plain) is None
    args = long_arguments(torch.float32, 2)
    assert attention.cached_attention(*args, *plain, torch.zeros(6).double()) is None
    assert attention.cached_attention(*args, None, 0.0) is None
    assert attention.cached_attention(*args, 0, None) is None
    assert attention.cached_attention(args[0].double(), *args[1:], *plain) is None
    args[3] = args[3].mT.contiguous().mT
    assert attention.cached_attention(*args, *plain) is None
    block = Block([3], [CHAIN])
    block.k_block = block.k_block.double()
    assert attention.block_attention(*block.apart(range(5))) is None
