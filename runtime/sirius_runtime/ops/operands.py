"""Tuples of operands: a function takes them as one value, an operator's schema one by one.

They hold torch tensors in references and kernels, `graph_rules.Array` in the rules of graphs, and
ONNX values in translations.
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
    """The places of the call's tokens: positions [B, T], slots [B, T] of the caches (or nodes [T]
    of the block), the number of committed tokens of each row [B], and the block's tree mask
    [B | 1, T, M] (see `attention`).
    """

    positions: T
    slots: T
    length: T
    tree_mask: T


class Attention(NamedTuple, Generic[T]):
    """A layer's parameters: its index, the scale of scores, the sliding window, the softcap of
    scores, and the attention sinks [H]: a score of each head for a token without a value.
    """

    layer: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: T | None = None


def grouped(function: Callable[..., _R]) -> Callable[..., _R]:
    """`function` with the signature of the operator's schema: the fields of its tuples are passed
    one by one.

    def topk_mlp(x: Tensor, mlp: Mlp[Tensor], keep: int)    is called    topk_mlp(x, *mlp, keep)

    The wrapper is generated code, as in namedtuple. It is called for every layer of every step, and
    a loop over the tuples took twice as long.
    """
    hints = typing.get_type_hints(function)
    names: dict[str, Any] = {"function": function, "new": tuple.__new__}
    parameters: list[str] = []
    passed: list[str] = []

    def parameter(name: str, default: Any) -> str:
        while name in names:  # tuples may have fields of the same name, as k of Heads and Caches
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
    del call.__wrapped__  # type: ignore[attr-defined]  # `inspect` would show its signature
    return call
