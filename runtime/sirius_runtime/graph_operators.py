"""The operators that a graph of an artifact may call: those that our passes emit, and no others.

An artifact may come from an untrusted source, and torch has three thousand operators. Some of them
write to any address or pass a string to a compiler. A row of the table names an operator, the rule
that its arguments must meet, and the allowed values of its string arguments. A model whose graph
needs another operator is refused when it is compiled. To add an operator, add a row with a rule
here; first make sure that its kernel checks what the rule can't (values in tensors).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sirius_runtime import graph_rules as rules
from sirius_runtime import operators
from sirius_runtime.errors import shown
from sirius_runtime.graph_rules import Array, CallError, Scalar, need
from sirius_runtime.graph_sizes import Expression

Rule = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """An allowed operator. `strings`: the allowed values of each string argument. `numbers`:
    whether plain numbers may be passed for tensors, as torch's binary operators allow.
    """

    rule: Rule
    strings: Mapping[str, tuple[str, ...]] | None = None
    numbers: bool = False


def _of_two(rule: Rule) -> Row:
    return Row(rule, numbers=True)


OPERATORS: dict[str, Row] = {
    # elementwise, one operand
    "aten.abs.default": Row(rules.of_numbers),
    "aten.bitwise_not.default": Row(rules.of_bits),
    "aten.clone.default": Row(rules.alike),
    "aten.contiguous.default": Row(rules.alike),
    "aten.cos.default": Row(rules.real),
    "aten.erf.default": Row(rules.real),
    "aten.exp.default": Row(rules.real),
    "aten.expm1.default": Row(rules.real),
    "aten.gelu.default": Row(rules.of_floats, {"approximate": ("none", "tanh")}),
    "aten.log.default": Row(rules.real),
    "aten.log1p.default": Row(rules.real),
    "aten.logical_not.default": Row(rules.to_bool),
    "aten.neg.default": Row(rules.of_numbers),
    "aten.reciprocal.default": Row(rules.real),
    "aten.relu.default": Row(rules.of_numbers),
    "aten.rsqrt.default": Row(rules.real),
    "aten.sigmoid.default": Row(rules.real),
    "aten.silu.default": Row(rules.of_floats),
    "aten.sin.default": Row(rules.real),
    "aten.softplus.default": Row(rules.of_floats),
    "aten.sqrt.default": Row(rules.real),
    "aten.square.default": Row(rules.of_numbers),
    "aten.tanh.default": Row(rules.real),
    "aten.to.device": Row(rules.to_dtype),
    "aten.to.dtype": Row(rules.to_dtype),
    "aten.type_as.default": Row(rules.type_as),
    # elementwise, several operands
    "aten.__and__.Tensor": Row(rules.bits),
    "aten.__or__.Tensor": Row(rules.bits),
    "aten.add.Tensor": _of_two(rules.arithmetic),
    "aten.clamp.Tensor": Row(rules.clamp_by),
    "aten.clamp.default": Row(rules.clamp),
    "aten.div.Tensor": _of_two(rules.quotient),
    "aten.div.Tensor_mode": Row(
        rules.rounded_quotient, {"rounding_mode": ("floor", "trunc")}, numbers=True
    ),
    "aten.eq.Scalar": Row(rules.comparison),
    "aten.eq.Tensor": Row(rules.comparison),
    "aten.floor_divide.default": _of_two(rules.floor_quotient),
    "aten.ge.Scalar": Row(rules.comparison),
    "aten.ge.Tensor": Row(rules.comparison),
    "aten.gt.Scalar": Row(rules.comparison),
    "aten.gt.Tensor": Row(rules.comparison),
    "aten.le.Scalar": Row(rules.comparison),
    "aten.le.Tensor": Row(rules.comparison),
    "aten.logical_and.default": Row(rules.comparison),
    "aten.logical_or.default": Row(rules.comparison),
    "aten.lt.Scalar": Row(rules.comparison),
    "aten.lt.Tensor": Row(rules.comparison),
    "aten.masked_fill.Scalar": Row(rules.masked_fill),
    "aten.masked_fill.Tensor": Row(rules.masked_fill),
    "aten.max.other": Row(rules.arithmetic),
    "aten.maximum.default": Row(rules.arithmetic),
    "aten.min.other": Row(rules.arithmetic),
    "aten.minimum.default": Row(rules.arithmetic),
    "aten.mul.Scalar": Row(rules.arithmetic),
    "aten.mul.Tensor": _of_two(rules.arithmetic),
    "aten.ne.Scalar": Row(rules.comparison),
    "aten.ne.Tensor": Row(rules.comparison),
    "aten.pow.Scalar": Row(rules.power_of),
    "aten.pow.Tensor_Scalar": Row(rules.power),
    "aten.pow.Tensor_Tensor": Row(rules.power_by),
    "aten.sub.Tensor": _of_two(rules.difference),
    "aten.where.ScalarOther": Row(rules.where),
    "aten.where.ScalarSelf": Row(rules.where),
    "aten.where.self": Row(rules.where),
    # along dimensions
    "aten.amax.default": Row(rules.extreme),
    "aten.any.default": Row(rules.any_of_all),
    "aten.argmax.default": Row(rules.place_of_extreme),
    "aten.cumsum.default": Row(rules.running_total),
    "aten.layer_norm.default": Row(rules.layer_norm),
    "aten.log_softmax.int": Row(rules.softmax),
    "aten.logsumexp.default": Row(rules.log_sum),
    "aten.max.default": Row(rules.extreme_of_all),
    "aten.max.dim": Row(rules.extreme_and_place),
    "aten.mean.dim": Row(rules.mean),
    "aten.rms_norm.default": Row(rules.rms_norm),
    "aten.softmax.int": Row(rules.softmax),
    "aten.sort.default": Row(rules.sort),
    "aten.sort.stable": Row(rules.stable_sort),
    "aten.sum.default": Row(rules.total_of_all),
    "aten.sum.dim_IntList": Row(rules.total),
    "aten.topk.default": Row(rules.topk),
    # products
    "aten.addmm.default": Row(rules.addmm),
    "aten.bmm.default": Row(rules.bmm),
    "aten.einsum.default": Row(rules.einsum, {"equation": ("lbni,bn->lbi",)}),
    "aten.linear.default": Row(rules.linear),
    "aten.matmul.default": Row(rules.matmul),
    "aten.mm.default": Row(rules.mm),
    # shapes
    "aten.cat.default": Row(rules.cat),
    "aten.chunk.default": Row(rules.chunk),
    "aten.concat.default": Row(rules.cat),
    "aten.expand.default": Row(rules.expand),
    "aten.flatten.using_ints": Row(rules.flatten),
    "aten.mT.default": Row(rules.matrices_transposed),
    "aten.numpy_T.default": Row(rules.matrix_transposed),
    "aten.permute.default": Row(rules.permute),
    "aten.repeat.default": Row(rules.repeat),
    "aten.repeat_interleave.self_int": Row(rules.repeat_interleave),
    "aten.reshape.default": Row(rules.reshape),
    "aten.select.int": Row(rules.select),
    "aten.slice.Tensor": Row(rules.slice_),
    "aten.slice_scatter.default": Row(rules.slice_scatter),
    "aten.split.Tensor": Row(rules.split),
    "aten.split_with_sizes.default": Row(rules.split_with_sizes),
    "aten.squeeze.default": Row(rules.squeeze_all),
    "aten.squeeze.dim": Row(rules.squeeze),
    "aten.stack.default": Row(rules.stack),
    "aten.t.default": Row(rules.t),
    "aten.transpose.int": Row(rules.transpose),
    "aten.unbind.int": Row(rules.unbind),
    "aten.unflatten.int": Row(rules.unflatten),
    "aten.unsqueeze.default": Row(rules.unsqueeze),
    "aten.view.default": Row(rules.reshape),
    # by indices
    "aten.embedding.default": Row(rules.embedding),
    "aten.gather.default": Row(rules.gather),
    "aten.index.Tensor": Row(rules.index),
    "aten.index_add.default": Row(rules.index_add),
    "aten.index_copy.default": Row(rules.index_copy),
    "aten.index_select.default": Row(rules.index_select),
    "aten.one_hot.default": Row(rules.one_hot),
    "aten.scatter.src": Row(rules.scatter),
    "aten.scatter.value": Row(rules.scatter),
    "aten.scatter_add.default": Row(rules.scatter),
    # creation
    "aten.arange.default": Row(rules.arange),
    "aten.arange.start": Row(rules.arange_from),
    "aten.arange.start_step": Row(rules.arange_by),
    "aten.eye.default": Row(rules.eye),
    "aten.full.default": Row(rules.full),
    "aten.full_like.default": Row(rules.full_like),
    "aten.new_empty.default": Row(rules.new_zeros),
    "aten.new_full.default": Row(rules.new_full),
    "aten.new_ones.default": Row(rules.new_zeros),
    "aten.new_zeros.default": Row(rules.new_zeros),
    "aten.ones.default": Row(rules.zeros),
    "aten.ones_like.default": Row(rules.zeros_like),
    "aten.scalar_tensor.default": Row(rules.scalar_tensor),
    "aten.zeros.default": Row(rules.zeros),
    "aten.zeros_like.default": Row(rules.zeros_like),
    # numbers on the host (`graph_check` computes their results)
    "aten.item.default": Row(rules.one_value),
    "aten.sym_constrain_range.default": Row(rules.constrained),
    "aten.sym_size.int": Row(rules.size_of),
    # ours
    **{
        f"sirius.{row.name}.default": Row(row.rule, row.strings)
        for row in operators.OPERATORS.values()
        if row.rule is not None
    },
}

FUNCTIONS: dict[str, tuple[Callable[..., Any], Rule]] = {
    "add": (operator.add, rules.size_add),
    "sub": (operator.sub, rules.size_sub),
    "mul": (operator.mul, rules.size_mul),
    "floordiv": (operator.floordiv, rules.size_floordiv),
    "mod": (operator.mod, rules.size_mod),
    "neg": (operator.neg, rules.size_neg),
    "getitem": (operator.getitem, rules.item_of),
}
"""Python functions: arithmetic of sizes, and items of operators that return several values."""

IGNORED = frozenset({"layout", "device", "pin_memory", "non_blocking", "copy", "memory_format"})
"""Arguments that are checked but not passed to rules: they change neither dtype nor sizes."""
_OFF = frozenset({"pin_memory", "non_blocking", "copy", "sparse_grad", "sparse"})
"""Flags that must be False: pinned memory needs a GPU, sparse tensors have no kernels here."""

DTYPES = frozenset(
    {
        *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    }
)
LAYOUTS = (torch.strided,)
MEMORY_FORMATS = (torch.contiguous_format, torch.preserve_format)
_INT64 = 2**63


@dataclass(frozen=True)
class Parameter:
    """An argument in an operator's schema; `kind`: torch's name of its type."""

    name: str
    kind: str
    optional: bool  # None may be passed
    required: bool
    keyword_only: bool
    default: Any


@functools.cache
def parameters(target: torch._ops.OpOverload) -> tuple[Parameter, ...]:
    """The arguments of an operator's schema."""
    found = []
    for argument in target._schema.arguments:
        kind, default = str(argument.real_type), argument.has_default_value()
        optional = kind.startswith("Optional[")
        found.append(
            Parameter(
                name=argument.name,
                kind=kind[len("Optional[") : -1] if optional else kind,
                optional=optional,
                required=not default,
                keyword_only=argument.kwarg_only,
                default=argument.default_value if default else None,
            )
        )
    return tuple(found)


@functools.cache
def operator_name(target: torch._ops.OpOverload) -> str:
    """``aten.add.Tensor``"""
    return f"{target.namespace}.{target._opname}.{target._overloadname}"


def row_of(target: object) -> Row | None:
    """The row of an operator; None if there is none."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return OPERATORS.get(operator_name(target))


def call(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of a call, as its operator's rule computes it. Raises CallError, with the reason,
    where the arguments do not match the operator's schema or break the rule.
    """
    row = row_of(target)
    need(row is not None, "it is not an operator that graphs may name")
    assert row is not None
    schema = parameters(target)
    passed = []
    for place, one in enumerate(schema):
        by_name = one.name in kwargs
        if place < len(args) and not one.keyword_only:
            need(not by_name, f"argument {one.name} is given twice")
            value = args[place]
        elif by_name:
            # The rewrites that put kernels into graphs read arguments by position.
            need(one.keyword_only, f"argument {one.name} must be positional")
            value = kwargs[one.name]
        else:
            need(not one.required, f"argument {one.name} is missing")
            if one.name not in IGNORED:
                passed.append(one.default)
            continue
        if not _fits(value, one, row):
            raise CallError(f"argument {one.name} ({one.kind}) can't be {shown(value)}")
        if one.name not in IGNORED:
            passed.append(value)
    if len(args) > sum(not one.keyword_only for one in schema):
        raise CallError("it has too many arguments")
    if unknown := kwargs.keys() - {one.name for one in schema}:
        raise CallError(f"it has no argument {min(unknown)!r}")
    return row.rule(*passed)


def _fits(value: Any, one: Parameter, row: Row) -> bool:
    """Whether a value may be passed for an argument."""
    if value is None:
        return one.optional
    if one.kind == "str":
        allowed = (row.strings or {}).get(one.name, ())
        return isinstance(value, str) and value in allowed
    if one.kind == "Tensor":
        return isinstance(value, Array) or (row.numbers and _is_number(value))
    return _KINDS[one.kind](value) and (one.name not in _OFF or value is False)


def _is_whole(value: Any) -> bool:
    if isinstance(value, Expression):
        return True
    return type(value) is int and -_INT64 <= value < _INT64


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, bool | float | Scalar)


def _is_real(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and -_INT64 <= value < _INT64)


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(fits, value))


def _is_array(value: Any) -> bool:
    return isinstance(value, Array)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "int": _is_whole,
    "SymInt": _is_whole,
    "List[int]": _is_list_of(_is_whole),
    "List[SymInt]": _is_list_of(_is_whole),
    "float": _is_real,
    "number": _is_number,
    "bool": lambda value: isinstance(value, bool),
    "List[Tensor]": lambda value: _is_list_of(_is_array)(value) and len(value) > 0,
    "List[Optional[Tensor]]": _is_list_of(lambda value: value is None or _is_array(value)),
    "ScalarType": lambda value: isinstance(value, torch.dtype) and value in DTYPES,
    "Device": lambda value: isinstance(value, torch.device),
    "Layout": lambda value: value in LAYOUTS,
    "MemoryFormat": lambda value: value in MEMORY_FORMATS,
}
