"""What the CPU kernels refuse, by name, before a size or an index is taken for granted."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_runtime.errors import OperandError, OperandIndexError
from sirius_runtime.kernels import linear, mlp, pointwise
from sirius_runtime.kernels.attention import block_attention_, cached_attention_by_tokens
from sirius_runtime.kernels.build import InstructionSet
from sirius_runtime.kernels.native import kernels
from tests.support.kernels import forbid_references, require
from tests.support.operators import LAYER, TREE, Block, mlp_args, moe_args, randn, sirius

ROWS, NODES, HEADS, GROUPS, KEY, VALUE, SLOTS = 2, 7, 4, 2, 3, 5, 24
X, GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS = range(7)

Change = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, and no references: what is refused is so by a kernel."""
    require(InstructionSet.PORTABLE)
    forbid_references(monkeypatch)


def refused(operator: str, operand: str, call: Callable[[], Any]) -> None:
    """Asserts that the operator and the operand are named, and the remedy."""
    said = rf"^sirius::{operator}: {re.escape(operand)} .*\. Compile the artifact again, or pass"
    with pytest.raises(OperandError, match=said):
        call()


def less(dimension: int) -> Change:
    """One less in that dimension."""
    return lambda tensor: tensor.narrow(dimension, 0, tensor.shape[dimension] - 1).contiguous()


def more(dimension: int) -> Change:
    def change(tensor: Tensor) -> Tensor:
        end = tensor.narrow(dimension, 0, 1)
        return torch.cat([tensor, end], dimension)

    return change


def none(dimension: int) -> Change:
    return lambda tensor: tensor.narrow(dimension, 0, 0).contiguous()


def with_value(value: int) -> Change:
    """The last number is this one."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[-1] = value
        return changed

    return change


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten()


# attention

CACHED = "q k v k_cache v_cache positions slots length tree_mask".split()
APART = "q k v k_cache v_cache k_block v_block positions nodes length tree_mask".split()

BOTH: list[tuple[str, str, Change]] = [  # the operand that is changed, the one that is named
    ("q", "q", flat),
    ("q", "k", less(2)),
    ("q", "k", less(3)),
    ("q", "k", lambda q: q[:, :1].contiguous()),  # fewer heads than k has
    ("q", "k", less(1)),
    ("k", "k", more(2)),
    ("k", "k", less(2)),
    ("k", "k", more(3)),
    ("k", "k", none(1)),
    ("v", "v", less(2)),
    ("v", "v", less(1)),
    ("v", "v_cache", less(3)),
    ("v", "v", none(3)),
    ("k_cache", "k_cache", less(4)),
    ("k_cache", "k_cache", less(2)),
    ("k_cache", "k_cache", less(1)),
    ("k_cache", "k_cache", none(3)),
    ("k_cache", "k_cache", lambda cache: cache[LAYER]),
    ("k_cache", "layer", less(0)),
    ("v_cache", "v_cache", less(4)),
    ("v_cache", "v_cache", less(3)),
    ("v_cache", "v_cache", less(0)),
    ("positions", "positions", less(0)),
    ("positions", "positions", less(1)),
    ("positions", "positions", with_value(-1)),
    ("length", "length", less(0)),
    ("length", "length", with_value(-1)),
    ("length", "length", with_value(SLOTS + 1)),
    ("length", "length", with_value(2**62)),
    ("tree_mask", "tree_mask", less(1)),
    ("tree_mask", "tree_mask", none(2)),
    ("tree_mask", "tree_mask", lambda mask: mask.repeat(3, 1, 1)),
]


def ids(value: Any) -> str:
    return value if isinstance(value, str) else ""


def cached_args(changes: dict[str, Change]) -> list[Any]:
    block = Block([3, 11], [TREE])
    given = [getattr(block, {"tree_mask": "mask"}.get(name, name)) for name in CACHED]
    given = [changes.get(name, lambda t: t)(t) for name, t in zip(CACHED, given, strict=True)]
    return [*given, LAYER, 0.4, None, None]


def apart_args(changes: dict[str, Change]) -> list[Any]:
    args = list(Block([3, 11], [TREE]).apart(range(NODES)))
    for at, name in enumerate(APART):
        args[at] = changes.get(name, lambda t: t)(args[at])
    return args


@pytest.mark.parametrize(
    ("operand", "named", "change"),
    [
        *BOTH,
        ("slots", "slots", less(0)),
        ("slots", "slots", less(1)),
        ("slots", "slots", flat),
        ("slots", "slots", with_value(-1)),
        ("slots", "slots", with_value(SLOTS)),
    ],
    ids=ids,
)
def test_cached_attention(operand: str, named: str, change: Change) -> None:
    sirius.cached_attention(*cached_args({}))
    args = cached_args({operand: change})
    refused("cached_attention", named, lambda: sirius.cached_attention(*args))
    refused("cached_attention", named, lambda: cached_attention_by_tokens(*args))


@pytest.mark.parametrize(
    ("operand", "named", "change"),
    [
        *BOTH,
        ("nodes", "slots", less(0)),
        ("nodes", "nodes", lambda nodes: nodes[None]),
        ("nodes", "slots", with_value(-1)),
        ("nodes", "slots", with_value(NODES)),
        ("k_block", "k_block", less(4)),
        ("k_block", "k_block", less(3)),
        ("k_block", "k_block", less(2)),
        ("k_block", "k_block", less(1)),
        ("v_block", "v_block", less(4)),
        ("v_block", "v_block", less(3)),
    ],
    ids=ids,
)
def test_block_attention(operand: str, named: str, change: Change) -> None:
    sirius.block_attention(*apart_args({}))
    args = apart_args({operand: change})
    refused("block_attention", named, lambda: sirius.block_attention(*args))
    refused("block_attention", named, lambda: block_attention_(*args))


def test_sinks_of_other_heads() -> None:
    args = [*cached_args({}), randn(HEADS - 1, seed=0)]
    refused("cached_attention", "sinks", lambda: sirius.cached_attention(*args))


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there(layer: int) -> None:
    args = cached_args({})
    args[len(CACHED)] = layer
    refused("cached_attention", "layer", lambda: sirius.cached_attention(*args))


def test_an_index_is_an_index_error_too() -> None:
    args = cached_args({"slots": with_value(SLOTS)})
    with pytest.raises(OperandIndexError, match=r"slots holds 24, .* there are 24 slots"):
        sirius.cached_attention(*args)
    assert issubclass(OperandIndexError, IndexError)
    assert issubclass(OperandError, ValueError)


# MLPs

MLPS: list[tuple[str, tuple[Any, ...]]] = [
    ("dense_mlp", ()),
    ("dense_mlp_activity", ()),
    ("dense_mlp_statistic", (torch.ones(2, 3, dtype=torch.bool),)),
    ("topk_mlp", (2,)),
    ("cats_mlp", (0.3,)),
    ("griffin_mlp", (torch.tensor([[[0, 1], [2, 3]]] * 2),)),
    ("griffin_cats_mlp", (torch.tensor([[[0, 1], [2, 3]]] * 2), 0.3)),
]


@pytest.mark.parametrize(("operator", "extra"), MLPS, ids=ids)
@pytest.mark.parametrize(
    ("at", "named", "change"),
    [
        (X, "gate", less(2)),
        (GATE, "up", less(0)),
        (GATE, "gate", more(1)),
        (UP, "up", less(0)),
        (UP, "up", more(1)),
        (DOWN, "down", less(0)),
        (DOWN, "down", less(1)),
        (GATE_BIAS, "gate_bias", less(0)),
        (UP_BIAS, "up_bias", less(0)),
        (DOWN_BIAS, "down_bias", more(0)),
    ],
)
def test_mlps(operator: str, extra: tuple[Any, ...], at: int, named: str, change: Change) -> None:
    args = [*mlp_args(bias=True), *extra]
    getattr(sirius, operator)(*args)
    args[at] = change(args[at])
    refused(operator, named, lambda: getattr(sirius, operator)(*args))


@pytest.mark.parametrize("operator", ["griffin_mlp", "griffin_cats_mlp"])
@pytest.mark.parametrize("change", [with_value(-1), with_value(13), less(1), more(1)])
def test_neurons(operator: str, change: Change) -> None:
    neurons = change(torch.tensor([[[0, 1], [2, 3]]] * 2))
    args = [*mlp_args(), neurons, *([0.3] if "cats" in operator else [])]
    refused(operator, "neurons", lambda: getattr(sirius, operator)(*args))


def test_an_mlp_of_no_channels() -> None:
    args = mlp_args()
    args[:4] = [none(-1)(tensor) for tensor in args[:4]]
    refused("dense_mlp", "x", lambda: sirius.dense_mlp(*args))


def test_the_mlp_of_a_prompt_whose_up_has_fewer_neurons_than_its_gate() -> None:
    """Of more tokens than MLPs have kernels for: its products are torch's."""
    args = mlp_args()
    args[X] = randn(2, 90, 5, seed=0)
    mlp.dense_mlp(*args)
    args[UP] = args[UP][:-1]
    refused("dense_mlp", "up", lambda: sirius.dense_mlp(*args))


# linears


@pytest.mark.parametrize(
    ("weight", "bias", "named"),
    [((8, 6), 8, "weight"), ((8, 4), 8, "weight"), ((8, 5), 7, "bias"), ((0, 5), None, "weight")],
)
def test_linears(weight: tuple[int, int], bias: int | None, named: str) -> None:
    x, w = randn(1, 3, 5, seed=0), randn(*weight, seed=1)
    offset = None if bias is None else randn(bias, seed=2)
    refused("linear", named, lambda: sirius.linear(x, w, offset))
    pair = (randn(2, 5, seed=3), w), (None, offset)
    refused("linear", named, lambda: linear.linears(x, *pair))


@pytest.mark.parametrize(
    ("weight", "bias", "named"),
    [
        ((6, 8), 8, "weight"),
        ((4, 8), 8, "weight"),
        ((5, 8), 9, "bias"),
        ((5, 0), None, "weight"),
    ],
)
def test_sparse_linear(weight: tuple[int, int], bias: int | None, named: str) -> None:
    x, w = randn(1, 3, 5, seed=0), randn(*weight, seed=1)
    offset = None if bias is None else randn(bias, seed=2)
    args = [x, w, offset, 0.3]
    refused("sparse_linear", named, lambda: sirius.sparse_linear(*args))


def test_the_bias_of_a_transposed_weight() -> None:
    x, w = randn(1, 5, seed=0), randn(5, 8, seed=1)
    refused("linear", "bias", lambda: sirius.linear(x, w.t(), randn(7, seed=2)))
    refused("linear", "weight", lambda: sirius.linear(x, w[:, :0].t(), None))


# what lies between


def test_the_C_side_compares_by_itself() -> None:  # noqa: N802
    """Where Python's callers see to it that sizes agree: a caller that does not is refused."""
    library = kernels()
    assert library is not None
    x, y = torch.ones(2, 6), torch.empty(2, 6)
    at, out = x.data_ptr(), y.data_ptr()
    turned = pointwise._ROTATE.pack(at, 1, 1, 2, 6, 12, 12, 6, at, 1, 1, 2, 5, at, 1, 1, 2, 6)
    odd = pointwise._ROTATE.pack(at, 1, 1, 2, 5, 10, 10, 5, at, 1, 1, 2, 5, at, 1, 1, 2, 5)
    norm, rotate, linears = library.sirius_rms_norm, library.sirius_rotate, library.sirius_linears
    for call, said in (
        (lambda: norm(0, at, 12, 0, 0, 0, at, 5, 1e-6, out, 1), "x has 12 numbers"),
        (lambda: norm(0, at, 12, at, 11, out, at, 6, 1e-6, out, 1), "addend has 11"),
        (lambda: rotate(0, turned, out, 1), "cosine has 5 numbers a head, not 6"),
        (lambda: rotate(0, odd, out, 1), "x has 5 numbers a head"),
        (lambda: library.sirius_gated(0, 0, out, 12, at, 11, out, 1), "up has 11 products, not 12"),
        (lambda: library.sirius_activity(0, at, out, 2, 0, 1), "z has 0 neurons"),
        (lambda: linears(0, at, 65, 6, b"", 0, 1), "x has 65 tokens, not 1 to 64"),
        (lambda: linears(0, at, 1, 6, b"", 9, 1), "the call has 9 weights, not 0 to 8"),
        (lambda: linears(0, 0, 1, 6, b"", 0, 1), "x has no memory"),
    ):
        assert call() == 3
        assert library.sirius_reason().decode().startswith(said)


# mixtures


@pytest.mark.parametrize("operator", ["dense_moe", "topk_moe", "experts_moe"])
@pytest.mark.parametrize("expert", [-1, 5, 2**40])
def test_experts_that_are_not_there(operator: str, expert: int) -> None:
    args = moe_args()
    args[1] = args[1].clone()
    args[1][2, 1] = expert
    extra = {"topk_moe": (3,), "experts_moe": (3, False)}.get(operator, ())
    refused(operator, "experts", lambda: getattr(sirius, operator)(*args, *extra))


@pytest.mark.parametrize(
    ("at", "named"), [(1, "experts"), (2, "weights"), (0, "experts")], ids=["experts", "w", "x"]
)
def test_experts_of_fewer_tokens(at: int, named: str) -> None:
    args = moe_args()
    args[at] = args[at][:3]
    refused("dense_moe", named, lambda: sirius.dense_moe(*args))
    refused("topk_moe", named, lambda: sirius.topk_moe(*args, 3))
