"""Operands that travel together: one value within a function, one by one in an operator's schema.

The tuples are of torch's tensors in references and kernels, of `graph_rules.Array` in the rules of
graphs, and of ONNX values in translations.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

T = TypeVar("T")
_R = TypeVar("_R")


class Mlp(NamedTuple, Generic[T]):
    """An MLP's weights [I, C] and biases [I], [I], [C], its activation and the index of its layer.
    No `up`: a plain MLP. The weights of a mixture's experts are [E, I, C].
    """

    gate: T
    up: T | None
    down: T
    gate_bias: T | None
    up_bias: T | None
    down_bias: T | None
    act: str
    layer: int


class Heads(NamedTuple, Generic[T]):
    """Queries [B, H, T, D], keys [B, G, T, D] and values [B, G, T, Dv] of the call's tokens."""

    q: T
    k: T
    v: T


class Caches(NamedTuple, Generic[T]):
    """Keys [layers, B, G, S, D] and values [layers, B, G, S, Dv] of all layers: of the committed
    tokens, or of a block of M slots.
    """

    k: T
    v: T


class Places(NamedTuple, Generic[T]):
    """Where the call's tokens stand: positions [B, T], slots [B, T] of the caches (or nodes [T] of
    the block), the committed tokens of each row [B], and who sees whom in the block [B | 1, T, M].
    """

    positions: T
    slots: T
    length: T
    tree_mask: T


class Attention(NamedTuple, Generic[T]):
    """What is a layer's own: its index, the scale of scores, the window, the bound of scores, and
    the scores of a token without a value, one a head [H].
    """

    layer: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: T | None = None


def grouped(function: Callable[..., _R]) -> Callable[..., _R]:
    """`function`, called as graphs call an operator: with the fields of its tuples one by one.

    def topk_mlp(x: Tensor, mlp: Mlp[Tensor], keep: int)    is called    topk_mlp(x, *mlp, keep)

    It is a function of as many parameters, made as namedtuple makes its own: it is called for every
    layer of every step, and a loop over the tuples took twice as long.
    """
    hints = typing.get_type_hints(function)
    names: dict[str, Any] = {"function": function, "new": tuple.__new__}
    parameters: list[str] = []
    passed: list[str] = []

    def parameter(name: str, default: Any) -> str:
        while name in names:  # k of the heads, and of the caches
            name += "_"
        names[name] = default
        given = default is not inspect.Parameter.empty
        parameters.append(f"{name}={name}" if given else name)
        return name

    for name, own in inspect.signature(function).parameters.items():
        kind = typing.get_origin(hints[name]) or hints[name]
        if own.kind is inspect.Parameter.VAR_POSITIONAL:
            parameters.append(f"*{name}")
            passed.append(f"*{name}")
        elif hasattr(kind, "_fields"):
            defaults = kind._field_defaults
            fields = [parameter(f, defaults.get(f, inspect.Parameter.empty)) for f in kind._fields]
            names[kind.__name__] = kind
            passed.append(f"new({kind.__name__}, ({', '.join(fields)}))")
        else:
            passed.append(parameter(name, own.default))
    code = f"lambda {', '.join(parameters)}: function({', '.join(passed)})"
    call: Callable[..., _R] = functools.update_wrapper(eval(code, names), function)
    del call.__wrapped__  # type: ignore[attr-defined]  # its signature is another
    return call
