"""Graphs as text, the same on every run and machine, so that graphs can be compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sirius_passes.program import CALIBRATED, INPUTS, OUTPUTS
from sirius_runtime.dtypes import dtype_name
from sirius_runtime.graph import CAPTURE_DTYPE, INPUT, WEIGHT, placeholders, subgraph


def print_graph(module: fx.GraphModule) -> str:
    """One line a node: ``%name: dtype[shape] = target(arguments)``.

    Values are numbered in order and symbolic sizes printed by their letters (`B`, `T`, …), so the
    text depends on the graph alone. The program's dtype prints as ``model``, and numbers chosen by
    calibration as ``<calibrated>``.
    """
    return "\n".join(_lines(module, _size_letters(module.graph))) + "\n"


def _lines(module: fx.GraphModule, letters: dict[str, str], nested: bool = False) -> list[str]:
    names: dict[fx.Node, str] = {}
    lines = []
    for node in module.graph.nodes:
        if node.op == "output" and nested:
            lines.append(f"return {_argument(node.args[0], names)}")
        elif node.op == "output":
            pairs = zip(node.meta[OUTPUTS], node.args[0], strict=True)
            lines.append("return " + ", ".join(f"{o}={names[v]}" for o, v in pairs))
        elif node.op == "placeholder" and nested:
            names[node] = f"%{len(names)}"
            lines.append(f"argument {names[node]}: {_value(node.meta['val'], letters)}")
        elif node.op == "placeholder":
            kind = WEIGHT if WEIGHT in node.meta else INPUT
            names[node] = f"%{node.meta[kind]}"
            lines.append(f"{kind} {names[node]}: {_value(node.meta['val'], letters)}")
        elif node.op == "get_attr":
            names[node] = f"%{len(names)}"
            inner = subgraph(node)
            lines.append(f"{names[node]} = graph:")
            lines += [f"    {line}" for line in _lines(inner, letters, nested=True)]
        else:
            names[node] = f"%{len(names)}"
            lines.append(_call_line(node, names, letters))
    return lines


def _call_line(node: fx.Node, names: dict[fx.Node, str], letters: dict[str, str]) -> str:
    calibrated = node.meta.get(CALIBRATED, ())
    arguments = [
        "<calibrated>" if i in calibrated else _argument(a, names) for i, a in enumerate(node.args)
    ]
    arguments += [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()]
    value = f": {_value(node.meta['val'], letters)}" if "val" in node.meta else ""
    return f"{names[node]}{value} = {target_name(node)}({', '.join(arguments)})"


def target_name(node: fx.Node) -> str:
    """The printed name of a call's target: ``aten.linear``, ``aten.slice.Tensor``, ``getitem``."""
    name = str(getattr(node.target, "_name", None) or getattr(node.target, "__name__", ""))
    return name.replace("::", ".")


def _size_letters(graph: fx.Graph) -> dict[str, str]:
    """Symbolic size → letter, from the inputs' known shapes."""
    letters: dict[str, str] = {}
    for name, node in placeholders(graph, INPUT).items():
        for letter, size in zip(INPUTS[name].shape, node.meta["val"].shape, strict=True):
            if not isinstance(size, int):
                letters.setdefault(str(size), str(letter))
    return letters


def _value(value: Any, letters: dict[str, str]) -> str:
    if isinstance(value, torch.Tensor):
        dtype = "model" if value.dtype is CAPTURE_DTYPE else dtype_name(value.dtype)
        return f"{dtype}[{', '.join(_size(s, letters) for s in value.shape)}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(_value(v, letters) for v in value)})"
    return _size(value, letters)


def _size(size: Any, letters: dict[str, str]) -> str:
    text = str(size)
    for symbol, letter in sorted(letters.items(), key=lambda item: -len(item[0])):
        text = text.replace(symbol, letter)
    return text


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(_argument(v, names) for v in value)}]"
    if isinstance(value, torch.dtype):
        return "model" if value is CAPTURE_DTYPE else dtype_name(value)
    return repr(value)
