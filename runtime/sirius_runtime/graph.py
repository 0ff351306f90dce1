"""Converts an `fx.GraphModule` to and from plain JSON, without pickle and without code.

A document lists nodes in order. Inputs and weights are named. A call names an operator of the table
`graph_operators.OPERATORS`, control flow (`while_loop`, `cond`) or one of a few Python functions on
sizes; a document can run nothing else. Arguments are literals or references to earlier nodes. A
subgraph of control flow is a document within the document; its placeholders are its arguments, by
position. `graph_check` checks arguments and results. The dtype that graphs are captured in
(`CAPTURE_DTYPE`) stands for "the program's dtype" and is written as ``model``, so one graph runs in
any floating point dtype. Devices are also written as ``model``.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from sirius_runtime.dtypes import dtype_name, dtype_of
from sirius_runtime.errors import ArtifactError
from sirius_runtime.graph_operators import (
    DTYPES,
    FUNCTIONS,
    LAYOUTS,
    MEMORY_FORMATS,
    OPERATORS,
    operator_name,
)
from sirius_runtime.spec import JSON

CAPTURE_DTYPE = torch.bfloat16
"""Graphs are captured in this dtype, which no model computes in unless it is the model's own: every
constant of this dtype in a graph therefore means "the program's dtype"."""

_MAX_DEPTH = 4  # of graphs within graphs
_MAX_NESTING = 4  # of lists within an argument

WEIGHT, INPUT = "weight", "input"  # keys of a placeholder's meta: the name that it is bound to

_CONTROL_FLOW = {
    "while_loop": torch.ops.higher_order.while_loop,
    "cond": torch.ops.higher_order.cond,
}
_FUNCTIONS = {name: function for name, (function, _) in FUNCTIONS.items()}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_ENUMS: dict[str, dict[str, Any]] = {
    "layout": {str(layout): layout for layout in LAYOUTS},
    "memory_format": {str(one): one for one in MEMORY_FORMATS},
}


def module_of(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module of the graph whose Python code is generated when it is first called. Most graphs are
    rewritten, checked or stored but never called, and generating their code would take most of the
    time.
    """
    return _LazyGraphModule(root, graph)


def write_code(module: fx.GraphModule) -> fx.GraphModule:
    """Generates the Python code of a module and of its control flow's subgraphs, if it is not
    generated yet. Needed before the module is traced. Returns `module`.
    """
    for part in module.modules():
        if isinstance(part, _LazyGraphModule):
            part.real_recompile()
    return module


def placeholders(graph: fx.Graph, kind: str) -> dict[str, fx.Node]:
    """The placeholders bound to a weight (`WEIGHT`) or an input (`INPUT`), by bound name, in
    order.
    """
    return {n.meta[kind]: n for n in graph.nodes if n.op == "placeholder" and kind in n.meta}


def to_document(module: fx.GraphModule) -> JSON:
    """`module`'s graph as JSON values. Every placeholder must be bound (`WEIGHT` or `INPUT` in
    meta).
    """
    return _to_document(module, nested=False)


def _to_document(module: fx.GraphModule, nested: bool) -> JSON:
    nodes = []
    for node in module.graph.nodes:
        record: dict[str, JSON] = {"name": node.name}
        if node.op == "placeholder" and nested:
            record |= {"op": "argument"}
        elif node.op == "placeholder":
            kind = WEIGHT if WEIGHT in node.meta else INPUT
            if kind not in node.meta:
                raise ArtifactError(f"placeholder {node.name} is bound to no weight and no input")
            record |= {"op": kind, "bound": node.meta[kind]}
        elif node.op == "get_attr" and isinstance(inner := subgraph(node), fx.GraphModule):
            record |= {"op": "graph", "graph": _to_document(inner, nested=True)}
        elif node.op == "call_function":
            record |= {"op": "call", "target": _target_name(node.target)}
            record["args"] = [_encode(a) for a in node.args]
            if node.kwargs:
                record["kwargs"] = {k: _encode(v) for k, v in node.kwargs.items()}
        elif node.op == "output":
            record |= {"op": "output", "args": _encode(node.args[0])}
        else:
            raise ArtifactError(f"node {node.name}: a {node.op} node can't be stored")
        nodes.append(record)
    return {"nodes": nodes}


def subgraph(node: fx.Node) -> Any:
    """The subgraph of control flow that a ``get_attr`` node refers to."""
    owner = node.graph.owning_module
    return None if owner is None else getattr(owner, str(node.target), None)


def from_document(document: JSON, dtype: torch.dtype, device: torch.device) -> fx.GraphModule:
    """The graph of a document, computing in `dtype` on `device`.

    Raises ArtifactError for a document that names an operator outside the table, refers to a node
    that is not defined before, or does not have the form that `to_document` writes.
    """
    return _from_document(document, dtype, device, depth=0)


def _from_document(
    document: JSON, dtype: torch.dtype, device: torch.device, depth: int
) -> fx.GraphModule:
    root, graph = torch.nn.Module(), fx.Graph()
    env: dict[str, fx.Node] = {}

    def decode(value: JSON, within: int = 0) -> Any:
        if isinstance(value, list):
            if within == _MAX_NESTING:  # below the limit of Python's compiler, which runs later
                raise ArtifactError("graph: an argument's lists are nested too deep")
            return [decode(v, within + 1) for v in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "node":
            return env[content]
        if kind == "dtype":
            return dtype if content == "model" else _dtype_of(content)
        if kind == "device":
            return device
        if kind == "float":
            return float(content)
        return _ENUMS[kind][content]

    try:
        for record in document["nodes"]:
            name, op = _identifier(record["name"]), record["op"]
            if op == "argument" and depth:
                node = graph.placeholder(name)
            elif op == "graph" and depth < _MAX_DEPTH:
                inner = _from_document(record["graph"], dtype, device, depth + 1)
                # Not the document's name, which could be that of an attribute of nn.Module.
                own = f"graph_{len(env)}"
                root.add_module(own, inner)
                node = graph.create_node("get_attr", own, name=name)
            elif op in (WEIGHT, INPUT) and not depth:
                if not isinstance(record["bound"], str):
                    raise ArtifactError(f"graph: placeholder {name} is bound to no name")
                node = graph.placeholder(name)
                node.meta[op] = record["bound"]
            elif op == "call":
                args = tuple(decode(a) for a in record["args"])
                if record["target"].startswith("python.") and not isinstance(args[0], fx.Node):
                    raise ArtifactError(f"graph: node {name} takes only constants")
                kwargs = {_identifier(k): decode(v) for k, v in record.get("kwargs", {}).items()}
                node = graph.create_node(
                    "call_function", _target_of(record["target"]), args, kwargs, name=name
                )
            elif op == "output":
                returned = decode(record["args"])
                node = graph.output(tuple(returned) if isinstance(returned, list) else returned)
            else:
                raise ArtifactError(f"graph: node {name!r} has the unknown op {op!r}")
            if node.name != name and op != "output":
                # fx renames a node whose name is taken or reserved by fx.
                raise ArtifactError(
                    f"graph: {name!r} can't be the name of a node, or two nodes have it"
                )
            env[name] = node
        if [n for n in graph.nodes if n.op == "output"] != [next(iter(reversed(graph.nodes)))]:
            raise ArtifactError("graph: its last node, and no other, must be the output")
        graph.lint()
        return module_of(root, graph)
    except ArtifactError:
        raise
    except Exception as error:  # fx raises many kinds
        raise ArtifactError(f"graph: not a graph document ({error!r})") from error


def _dtype_of(name: str) -> torch.dtype:
    dtype = dtype_of(name)
    if dtype not in DTYPES:
        raise ArtifactError(f"graph: dtype {name!r} is not one that graphs may use")
    return dtype


def _identifier(name: JSON) -> str:
    """`name`, if it is a Python identifier; else raises ArtifactError. fx puts the names of
    placeholders and keywords into code that it runs.
    """
    is_name = isinstance(name, str) and name.isascii() and name.isidentifier()
    if not is_name or keyword.iskeyword(name):
        raise ArtifactError(f"graph: {name!r} is not a name")
    return name


def storable(target: Any) -> bool:
    """Whether a document can hold a call of `target`."""
    return (
        (isinstance(target, torch._ops.OpOverload) and operator_name(target) in OPERATORS)
        or target in _CONTROL_FLOW.values()
        or target in _FUNCTION_NAMES
    )


def _target_name(target: Any) -> str:
    if not storable(target):
        raise ArtifactError(
            f"a call of {target} can't be stored: it is not among the operators that an artifact "
            "may name (sirius_runtime.graph_operators)"
        )
    if isinstance(target, torch._ops.OpOverload):
        return operator_name(target)
    for name, operator_ in _CONTROL_FLOW.items():
        if target is operator_:
            return f"control_flow.{name}"
    return f"python.{_FUNCTION_NAMES[target]}"


def _target_of(name: JSON) -> Callable[..., Any]:
    if not isinstance(name, str):
        raise ArtifactError("graph: not a graph document (an operator is named by text)")
    namespace, _, rest = name.partition(".")
    if namespace == "python" and rest in _FUNCTIONS:
        return _FUNCTIONS[rest]
    if namespace == "control_flow" and rest in _CONTROL_FLOW:
        return _CONTROL_FLOW[rest]
    if name in OPERATORS:
        opname, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), opname, None)
        found = getattr(packet, overload, None)
        if isinstance(found, torch._ops.OpOverload):  # this version of torch may not have it
            return found
    raise ArtifactError(
        f"graph: operator {name!r} is unknown here; the artifact may need another version of torch "
        "or of this runtime"
    )


def _encode(value: Any) -> JSON:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_encode(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": "model" if value is CAPTURE_DTYPE else dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": "model"}
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return {"float": str(value)}  # JSON has no infinities
    for kind, names in _ENUMS.items():
        if value in names.values() and not isinstance(value, bool | int | float | str):
            return {kind: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ArtifactError(f"a constant of type {type(value).__name__} can't be stored in a graph")
