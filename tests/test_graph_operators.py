"""The operators that graphs may name: what a rule lets through runs, and gives what it says."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sirius_compile.onnx.aten import ATEN as ATEN_TO_ONNX
from sirius_runtime.graph import to_document
from sirius_runtime.graph_operators import (
    _KINDS,
    DTYPES,
    OPERATORS,
    Parameter,
    call,
    operator_name,
    parameters,
)
from sirius_runtime.graph_rules import Array, CallError, Scalar
from sirius_runtime.kernels.native import references
from sirius_runtime.nested import Layout, nest
from sirius_runtime.ops.mlp import ACTIVATIONS
from sirius_runtime.ops.moe import EXPERT_ACTIVATIONS
from sirius_runtime.spec import JSON
from tests.support.models import EVERY_METHOD, TinyModels
from tests.support.operators import (
    CHAIN,
    EXPERTS,
    Block,
    linear_args,
    mlp_args,
    moe_args,
    randn,
)

ATEN = [name for name in OPERATORS if name.startswith("aten.")]
OURS = [name for name in OPERATORS if name.startswith("sirius.")]
_OF_THE_HOST = {"aten.item.default", "aten.sym_constrain_range.default", "aten.sym_size.int"}


def overload(name: str) -> torch._ops.OpOverload:
    namespace, opname, overload = name.split(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), opname), overload)
    return found


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_torch_s_and_of_known_arguments(name: str) -> None:
    target = overload(name)
    assert operator_name(target) == name
    strings = OPERATORS[name].strings or {}
    for one in parameters(target):
        assert one.kind in {*_KINDS, "Tensor", "str"}
        assert (one.kind == "str") == (one.name in strings), "every string is enumerated"
    assert not [a for a in target._schema.arguments if a.alias_info and a.alias_info.is_write] or (
        name == "sirius.cached_attention.default"
    ), "but for the caches, nothing is written in place"


def test_what_has_an_onnx_form_may_be_named() -> None:
    assert {f"aten.{name}" for name in ATEN_TO_ONNX} <= OPERATORS.keys()


# against torch itself


def test_what_a_rule_lets_through_runs_and_gives_what_it_says() -> None:
    """Random arguments of each operator's schema: torch runs what the rule accepts."""
    for name in ATEN:
        if name in _OF_THE_HOST:
            continue
        target, accepted, chance = overload(name), 0, random.Random(name)
        for _ in range(TRIES):
            args, kwargs = drawn(target, name, chance)
            accepted += agrees(target, args, kwargs)
        if name not in _RARE:
            assert accepted >= 5, f"{name}: too few of the random calls are right ones"


TRIES = 400
_RARE = {"aten.addmm.default", "aten.einsum.default"}
"""Random shapes seldom fit."""


def test_products_that_chance_seldom_makes() -> None:
    addmm, einsum = overload("aten.addmm.default"), overload("aten.einsum.default")
    for bias in (torch.ones(4), torch.ones(2, 4), torch.ones(1, 4), torch.ones(())):
        assert agrees(addmm, [bias, torch.ones(2, 3), torch.ones(3, 4)], {})
    for bias in (torch.ones(3), torch.ones(1, 2, 4), torch.ones(4).to(torch.bfloat16)):
        assert not agrees(addmm, [bias, torch.ones(2, 3), torch.ones(3, 4)], {})
    equation, (a, b) = "lbni,bn->lbi", (torch.ones(2, 3, 4, 5), torch.ones(3, 4))
    assert agrees(einsum, [equation, [a, b]], {})
    assert not agrees(einsum, [equation, [a, b.mT]], {})
    assert not agrees(einsum, [equation, [a]], {})
    index_add, index = overload("aten.index_add.default"), torch.tensor([0, 1, 0])
    assert agrees(index_add, [torch.ones(2, 4), 0, index, torch.ones(3, 4)], {})
    assert not agrees(index_add, [torch.ones(2, 4), 0, index, torch.ones(4, 3)], {})
    assert not agrees(index_add, [torch.ones(2, 4), 0, index, torch.ones(3, 4)], {"alpha": 2})


@pytest.mark.slow
def test_what_a_rule_lets_through_runs_for_many_more() -> None:
    for name in ATEN:
        chance = random.Random(f"{name}, more")
        if name not in _OF_THE_HOST:
            for _ in range(20 * TRIES):
                agrees(overload(name), *drawn(overload(name), name, chance))


def agrees(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the rule accepts; it must be right then."""
    try:
        said = call(
            target, [described(a) for a in args], {k: described(v) for k, v in kwargs.items()}
        )
    except CallError:
        return False
    with torch.no_grad(), references():
        found = target(*args, **kwargs)
    assert described(found) == said, (target, args, kwargs)
    return True


def described(value: Any) -> Any:
    """Tensors as what the rules know of them."""
    if isinstance(value, Tensor):
        return Array(value.dtype, tuple(value.shape))
    if isinstance(value, list | tuple):
        return tuple(map(described, value))
    return value


_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.int64, torch.int64, torch.bool)


def drawn(
    target: torch._ops.OpOverload, name: str, chance: random.Random
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments by the schema, often alike in shape and dtype."""
    shape = [chance.choice((1, 2, 3)) for _ in range(chance.choice((0, 1, 2, 2, 3)))]
    dtype = chance.choice(_DTYPES)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for one in parameters(target):
        if not one.required and chance.random() < 0.5:
            if one.keyword_only:
                continue
            break
        value = argument(one, name, shape, dtype, chance)
        if one.keyword_only:
            kwargs[one.name] = value
        else:
            args.append(value)
    for one in parameters(target)[len(args) :]:  # those after one that was left out
        if one.keyword_only and one.name not in kwargs and one.required:
            kwargs[one.name] = argument(one, name, shape, dtype, chance)
    return args, kwargs


def argument(
    one: Parameter, name: str, shape: list[int], dtype: torch.dtype, chance: random.Random
) -> Any:
    if one.optional and chance.random() < 0.3:
        return None
    whole = chance.choice((-3, -2, -1, 0, 0, 1, 1, 2, 3, 4))
    match one.kind:
        case "Tensor":
            if OPERATORS[name].numbers and chance.random() < 0.2:
                return chance.choice((whole, whole / 2, True))
            return tensor(one.name, shape, dtype, chance)
        case "List[Tensor]" | "List[Optional[Tensor]]":
            count = chance.choice((1, 2, 3))
            kind = "indices" if "Optional" in one.kind else one.name
            every = [tensor(kind, shape, dtype, chance) for _ in range(count)]
            if "Optional" in one.kind:
                return [None if chance.random() < 0.4 else each for each in every]
            return every
        case "List[int]" | "List[SymInt]":
            if chance.random() < 0.4:
                return list(shape)
            return [chance.choice((-1, 0, 1, 2, 3, 6)) for _ in range(chance.choice((0, 1, 2, 3)))]
        case "int" | "SymInt":
            return whole
        case "number":
            return chance.choice((whole, whole / 2, True, float("-inf")))
        case "float":
            return whole / 2
        case "bool":
            return chance.random() < 0.5
        case "str":
            return chance.choice((*(OPERATORS[name].strings or {}).get(one.name, ()), "no"))
        case "ScalarType":
            return chance.choice(sorted(DTYPES, key=str))
        case "Device":
            return torch.device("cpu")
        case "Layout":
            return torch.strided
        case "MemoryFormat":
            return torch.contiguous_format
    raise AssertionError(one.kind)


def tensor(name: str, shape: list[int], dtype: torch.dtype, chance: random.Random) -> Tensor:
    shape = list(shape)
    if shape and chance.random() < 0.4:
        shape[chance.randrange(len(shape))] = chance.choice((1, 2, 3))
    if chance.random() < 0.2:
        shape = shape[1:] if chance.random() < 0.5 else [2, *shape]
    if name in ("index", "indices"):
        if chance.random() < 0.4:  # a list of places
            shape = [chance.choice((1, 2, 3))]
        dtype = torch.int64 if chance.random() < 0.9 else dtype
    elif name in ("mask", "condition"):
        dtype = torch.bool
    elif chance.random() < 0.2:
        dtype = chance.choice(_DTYPES)
    if name == "other":
        return torch.ones(shape, dtype=dtype)  # something to divide by
    return torch.zeros(shape, dtype=dtype)  # an index of everything


# ours


def valid_calls() -> Iterator[tuple[str, list[Any]]]:
    """Right arguments of each of our operators."""
    mlp, biased = mlp_args(), mlp_args(bias=True)
    B, T, _ = mlp[0].shape
    neurons = torch.tensor([[[0, 3], [1, 2]]] * 2)
    valid = torch.ones(B, T, dtype=torch.bool)
    for args in (mlp, biased, nested_mlp_args()):
        yield "dense_mlp", args
        yield "dense_mlp_activity", args
        yield "dense_mlp_statistic", [*args, valid]
        yield "topk_mlp", [*args, 3]
        yield "cats_mlp", [*args, 0.1]
        yield "griffin_mlp", [*args, neurons]
        yield "griffin_cats_mlp", [*args, neurons, 0.1]
    yield "sparse_linear", [*linear_args(), 0.1]
    yield "sparse_linear", [*linear_args(bias=False), 0.1]
    x, bias = randn(B, T, 64, seed=0), randn(32, seed=1)
    by_outputs, by_inputs = (nested(32, 64, layout) for layout in Layout)
    yield "sparse_linear", [x, by_inputs, bias, 0.1]
    yield "linear", [x, by_outputs, bias]
    yield "linear", [x, by_outputs[:1], None]  # the high plane
    yield "linear", [x, by_inputs, bias]
    yield "linear", [x, randn(32, 64, seed=2), bias]
    yield "embedding", [by_outputs, torch.zeros(1, 3, dtype=torch.int64), torch.bfloat16]
    for args in (moe_args(), moe_args(bias=True), moe_args(plain=True), nested_moe_args()):
        yield "dense_moe", args
        yield "topk_moe", [*args, 4]
        yield "experts_moe", [*args, 2, True]
    block = Block([3, 5], [CHAIN], sinks=True)
    nodes = list(range(len(CHAIN)))
    yield "block_attention", list(block.apart(nodes, 4, 2.0))
    q, k, v, kc, vc, _, _, positions, _, length, mask, *kind = block.apart(nodes)
    yield "cached_attention", [q, k, v, kc, vc, positions, block.slots, length, mask, *kind]
    yield "attention", [q, k, v, 1, 0.4, None, None, randn(q.shape[1], seed=1)]


def nested(outputs: int, inputs: int, layout: Layout) -> Tensor:
    return nest(randn(outputs, inputs, seed=outputs), layout)


def nested_mlp_args() -> list[Any]:
    x, (gate, up) = randn(2, 3, 64, seed=0), (nested(32, 64, Layout.BY_OUTPUTS) for _ in range(2))
    down = nested(64, 32, Layout.BY_INPUTS)
    return [x, gate, up, down, None, None, randn(64, seed=1), "silu", 1]


def nested_moe_args() -> list[Any]:
    x, gate, up, down, *rest = nested_mlp_args()
    _, experts, weights, *_ = moe_args()
    planes = (torch.stack([weight] * EXPERTS, 1) for weight in (gate, up, down))
    return [x.flatten(0, 1)[: len(experts)], experts, weights, *planes, None, None, None, *rest[3:]]


def test_nested_weights_that_are_none_are_refused() -> None:
    """Bytes that no matrix of whole groups gives, and weights nested for another reader."""

    def bytes_of(*shape: int) -> Array:
        return Array(torch.uint8, shape)

    x = Array(torch.float32, (2, 3, 64))
    linear, sparse = "sirius.linear.default", "sirius.sparse_linear.default"
    refused(linear, r"has 3 planes, not 1 or 2", x, bytes_of(3, 32, 34))
    refused(linear, r"is not nested by outputs", x, bytes_of(2, 32, 35))
    refused(linear, r"is not nested by inputs", x, bytes_of(2, 2, 33, 16))
    refused(linear, r"24 outputs are not a multiple of 32", x, bytes_of(2, 2, 34, 12))
    refused(linear, r"can.t be multiplied", x, bytes_of(2, 32, 17))
    refused(sparse, r"weight must have 4 dimensions", x, bytes_of(2, 32, 34), None, 0.1)
    args = [described(value) for value in nested_mlp_args()]
    refused("sirius.dense_mlp.default", "gate", *args[:1], args[3], *args[2:])
    refused("sirius.dense_mlp.default", "down", *args[:3], args[1], *args[4:])
    plain = Array(torch.float32, (32, 64))
    refused("sirius.dense_mlp.default", "up", *args[:2], plain, *args[3:])
    moe = [described(value) for value in nested_moe_args()]
    refused("sirius.dense_moe.default", "gate", *moe[:3], bytes_of(2, 32, 34), *moe[4:])
    refused("sirius.dense_moe.default", "experts", *moe[:4], bytes_of(2, 4, 32, 34), *moe[5:])
    none = [bytes_of(2, 0, 32, 34)] * 2 + [bytes_of(2, 0, 1, 34, 32)]
    refused("sirius.dense_moe.default", "experts", *moe[:3], *none, *moe[6:])
    ids = Array(torch.int64, (1, 3))
    embedding = "sirius.embedding.default"
    refused(embedding, "weight", Array(torch.float32, (32, 64)), ids, torch.float32)
    refused(embedding, "floating point", bytes_of(2, 32, 34), ids, torch.int64)


def test_every_operator_of_ours_has_a_right_call() -> None:
    assert {f"sirius.{name}.default" for name, _ in valid_calls()} == set(OURS)
    for name, args in valid_calls():
        assert agrees(overload(f"sirius.{name}.default"), args, {}), name


def test_a_call_of_ours_with_one_argument_changed_is_refused_or_right() -> None:
    """Another size, rank, dtype or number in each place: torch's references run what is let
    through, and most of it is not."""
    refused = checked = 0
    for name, args in valid_calls():
        for place, value in enumerate(args):
            for other in changed(value):
                spoilt = [*args[:place], other, *args[place + 1 :]]
                refused += not agrees(overload(f"sirius.{name}.default"), cloned(spoilt), {})
                checked += 1
    assert checked > 800
    assert refused > 0.6 * checked


def cloned(args: Sequence[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, Tensor) else a for a in args]


def changed(value: Any) -> Iterator[Any]:
    if isinstance(value, Tensor):
        for dim in range(value.ndim):
            yield torch.cat([value, value], dim)
            yield value.narrow(dim, 0, 1)
            yield value.narrow(dim, 0, 0)
        yield value[None]
        yield value.double() if value.is_floating_point() else value.int()
        yield value.to(torch.int64) if value.is_floating_point() else value.float()
        yield None
        yield 1
    elif isinstance(value, str):
        yield from ("", 'silu", system("', 1, None)
    elif isinstance(value, bool):
        yield from (1, None, "True")
    else:
        yield from (-1, 0, 10**6, 2**70, float("nan"), float("inf"), "1", True, None, [1])


# strings


def strings_of(document: JSON) -> Iterator[tuple[str, str]]:
    """Every string that a call of a document passes, with the operator."""

    def within(value: JSON) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for one in value:
                yield from within(one)
        elif isinstance(value, dict):
            assert set(value) <= {"node", "dtype", "device", "layout", "memory_format", "float"}

    for node in document["nodes"]:
        if node["op"] == "graph":
            yield from strings_of(node["graph"])
        if node["op"] == "call":
            for value in (node["args"], list(node.get("kwargs", {}).values())):
                for text in within(value):
                    yield node["target"], text


ENUMERATED = {
    text for row in OPERATORS.values() for texts in (row.strings or {}).values() for text in texts
}


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_every_string_of_an_artifact_is_one_of_an_enumeration(
    tiny: TinyModels, method: str
) -> None:
    program = tiny("llama", method).compiled.program
    found = {pair for g in program.graphs.values() for pair in strings_of(to_document(g))}
    for target, text in found:
        assert any(text in texts for texts in (OPERATORS[target].strings or {}).values())
    assert bool(found) == (method not in ("teal", "none")), "MLPs name their activation"


def test_the_enumerations_are_words() -> None:
    others = {"none", "tanh", "floor", "trunc", "lbni,bn->lbi"}
    assert {*others, *ACTIVATIONS, *EXPERT_ACTIVATIONS} == ENUMERATED
    assert all(set(text) <= set("abcdefghijklmnopqrstuvwxyz_2,->") for text in ENUMERATED)


# arguments that are none


def refused(name: str, message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(CallError, match=message):
        call(overload(name), args, kwargs)


X = Array(torch.float32, (2, 3))


def test_an_argument_of_another_kind_is_refused_by_its_name() -> None:
    refused("aten.to.dtype", r"argument dtype \(ScalarType\) can't be 6", X, 6)
    refused("aten.to.dtype", r"can't be torch.complex64", X, torch.complex64)
    refused("aten.to.dtype", r"can't be torch.quint8", X, torch.quint8)
    refused("aten.softmax.int", r"argument dtype \(ScalarType\) can't be 999", X, -1, 999)
    refused("aten.zeros.default", r"argument layout .* can't be 0", [2], layout=0)
    refused(
        "aten.zeros.default", r"argument layout .* can't be torch.sp", [2], layout=torch.sparse_coo
    )
    refused("aten.zeros.default", r"argument device .* can't be 'cpu'", [2], device="cpu")
    refused("aten.zeros.default", r"argument pin_memory .* can't be True", [2], pin_memory=True)
    refused("aten.clone.default", "argument memory_format", X, memory_format=7)
    refused("aten.clone.default", "argument memory_format", X, memory_format=torch.channels_last)
    refused(
        "aten.gelu.default", r"argument approximate \(str\) can't be", X, approximate='"); evil'
    )
    refused("aten.einsum.default", "argument equation", "ab,ab->a", [X, X])
    refused("aten.slice.Tensor", r"argument dim \(int\) can't be '0'", X, "0")
    refused("aten.slice.Tensor", r"argument dim \(int\) can't be True", X, True)
    refused("aten.slice.Tensor", r"can't be 9223372036854775808", X, 0, 2**63)
    refused("aten.cat.default", "argument tensors", [])
    refused("aten.cat.default", "argument tensors", [X, 1])
    refused("aten.embedding.default", "argument indices", X, 1)
    refused("aten.linear.default", "argument weight", X, 2.0)


def test_calls_that_are_no_calls_of_the_operator() -> None:
    refused("aten.neg.default", "argument self is missing")
    refused("aten.neg.default", "too many arguments", X, X)
    refused("aten.neg.default", "it has no argument 'other'", X, other=X)
    refused("aten.mul.Tensor", "argument self is given twice", X, X, self=X)
    refused("aten.mul.Tensor", "argument other must be positional", X, other=X)
    refused("aten.segment_reduce.default", "not an operator that graphs may name", X, "sum")


def test_what_would_fill_the_memory_is_refused() -> None:
    refused("aten.zeros.default", "too large for any", [2**20, 2**20])
    refused("aten.arange.default", "too large for any", 2**60)
    refused("aten.expand.default", "too large for any", Array(torch.bool, (1,)), [2**40])
    refused("aten.one_hot.default", "too large for any", Array(torch.int64, (2,)), 2**60)


def test_numbers_that_are_read_off_tensors() -> None:
    flag = Array(torch.int64, (1,))
    assert call(overload("aten.item.default"), [flag], {}) == Scalar(torch.int64)
    refused("aten.item.default", "one element is needed", X)
    assert call(overload("aten.sym_size.int"), [X, -1], {}) == 3
    refused("aten.sym_size.int", "there is no dimension 2", X, 2)
