"""Translates an entry's graph document to an ONNX graph.

PyTorch's back ends run the same document. Control flow becomes Loop and If; their bodies read
values of the outer graph by name.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper

from sirius_compile.onnx import emit as e
from sirius_compile.onnx.aten import ATEN
from sirius_compile.onnx.nested import DOMAIN, Nested, function
from sirius_compile.onnx.scope import Kept, Scope, Value, value_info
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.operators import OPERATORS
from sirius_runtime.spec import JSON, EntrySpec, ProgramSpec, TensorSpec

OPSET = 18
"""The lowest opset with a reduction in `ScatterElements` and with axes as inputs, so that old
versions of ONNX Runtime can read the graphs."""
IR_VERSION = 8  # the version of opset 18's release

NEW_K, NEW_V = "k_new", "v_new"
"""Outputs with the K/V of the call's tokens, [layers, B, G, T, D], in place of writes to caches."""
NEXT = "next_"
"""Prefix of an output that has an input's name: the updated state."""

_ON_SIZES: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}
_ONNX_ON_SIZES = {"add": "Add", "sub": "Sub", "mul": "Mul"}


@dataclass
class Lowered:
    """An entry as an ONNX graph. `kept`: the inputs that the graph `select` computes, in order."""

    model: onnx.ModelProto
    kept: dict[str, Kept]
    outputs: tuple[TensorSpec, ...]


@dataclass
class Lowering:
    """Translates one entry, in one dtype."""

    program: ProgramSpec
    dtype: str

    def entry(self, spec: EntrySpec, document: JSON) -> Lowered:
        """The graph of `spec` from its document, without the outputs that `select` computes.

        Raises UnsupportedModelError, with its name, for an operator or argument without a
        translation.
        """
        root = Scope(sites=self.program.sparsity.sites)
        extents = self._extents()
        inputs = {i.name: i for i in spec.inputs}
        weights = {w.name: w for w in self.program.weights}

        def bound(record: JSON) -> Value | Nested:
            name = record["bound"]
            if record["op"] == "input":
                i = inputs[name]
                shape = [extents.get(str(letter), letter) for letter in i.shape]
                return root.input(name, self._dtype(i.dtype), shape)
            w = weights[name]
            if w.nested is not None:
                return Nested.of(w)
            return root.weight(name, self.dtype if w.retype else w.dtype, w.shape)

        values = self._run(root, document, bound)
        named = {o.name: (o, v) for o, v in zip(spec.outputs, values, strict=True)}
        if root.kept:
            named.pop("neurons", None)  # `select` selects the neurons, and gathers their weights
        if root.new_kv[0]:
            for name, block, D in zip((NEW_K, NEW_V), root.new_kv, ("D", "Dv"), strict=True):
                new = TensorSpec(name, "model", ("layers", "B", "G", "T", D))
                named[name] = (new, e.stack(root, block, 0))
        outputs = []
        for o, value in named.values():
            letters = [extents.get(str(letter), letter) for letter in o.shape]
            shape = [n if n is not None else a for n, a in zip(value.shape, letters, strict=True)]
            # An input and an output can't have the same name.
            name = f"{NEXT}{o.name}" if o.name in root.inputs else o.name
            outputs.append(value_info(root.returned(value, name), shape))
        graph = root.graph(spec.name, outputs)
        return Lowered(make_model(graph), root.kept, tuple(o for o, _ in named.values()))

    def _extents(self) -> dict[str, int | str]:
        """The sizes that the model fixes, by letter; other letters stay symbolic."""
        state, period, sparsity = self.program.state, self.program.period, self.program.sparsity
        return {
            "layers": state.layers,
            "G": state.kv_heads,
            "D": state.key_dim,
            "Dv": state.value_dim,
            "K": period.period,
            "I": sparsity.neurons,
            "kept": sparsity.kept_neurons,
            "V": self.program.model.vocab_size,
            "M": "T",  # the call's tokens are the block; a period's block is internal
        }

    def _dtype(self, name: str) -> str:
        return self.dtype if name == "model" else name

    def _run(self, scope: Scope, document: JSON, bound: Callable[[JSON], Any]) -> list[Any]:
        """Adds a document's nodes to `scope`; returns the values of its output."""
        env: dict[str, Any] = {}
        for record in document["nodes"]:
            op = record["op"]
            if op == "output":
                returned = self._decode(record["args"], env)
                return list(returned) if isinstance(returned, list) else [returned]
            if op == "graph":
                env[record["name"]] = record["graph"]
            elif op == "call":
                args = [self._decode(a, env) for a in record["args"]]
                kwargs = {k: self._decode(v, env) for k, v in record.get("kwargs", {}).items()}
                env[record["name"]] = self._call(scope, record, args, kwargs)
            else:
                env[record["name"]] = bound(record)
        raise UnsupportedModelError("onnx: a graph document has no output; compile the model again")

    def _decode(self, value: JSON, env: Mapping[str, Any]) -> Any:
        if isinstance(value, list):
            return [self._decode(v, env) for v in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        match kind:
            case "node":
                return env[content]
            case "dtype":
                return self._dtype(content)
            case "float":
                return float(content)
        return None  # a device or a layout, which ONNX does not have

    def _call(self, scope: Scope, record: JSON, args: list[Any], kwargs: dict[str, Any]) -> Any:
        target = record["target"]
        namespace, _, rest = target.partition(".")
        if namespace == "control_flow":
            return (self._loop if rest == "while_loop" else self._choice)(scope, *args)
        if namespace == "python":
            return _python(scope, rest, args, target)
        if namespace == "sirius":
            return _sirius(scope, rest.partition(".")[0], args, kwargs)
        kwargs = {k: v for k, v in kwargs.items() if not (k == "device" and v is None)}
        if rest == "slice.Tensor" and isinstance(args[0], Nested):
            return _applied(lambda _, *a: args[0].sliced(*a[1:]), target, scope, args, kwargs)
        if rest not in ATEN:
            raise UnsupportedModelError(_no_translation(target))
        return _applied(ATEN[rest], target, scope, args, kwargs)

    # control flow

    def _loop(
        self,
        scope: Scope,
        goes_on: JSON,
        step: JSON,
        carried: Sequence[Value],
        given: Sequence[Value],
    ) -> tuple[Value, ...]:
        """higher_order.while_loop as Loop. Its body reads `given` from the outer graph by name."""
        (first,) = self._inline(scope, goes_on, [*carried, *given])
        body = Scope(scope, repeats=True)
        body.input(body.new_name("iteration"), "int64", ())
        body.input(body.new_name("going"), "bool", ())
        inside = [body.input(body.new_name("carried"), v.dtype, v.shape) for v in carried]
        after = self._inline(body, step, [*inside, *given])
        (again,) = self._inline(body, goes_on, [*after, *given])
        returned = [body.returned(v) for v in (again, *after)]
        graph = body.graph(scope.new_name("draft"), [value_info(v) for v in returned])
        names = [scope.new_name("Loop") for _ in carried]
        inputs = ["", first.name, *(v.name for v in carried)]
        scope.nodes.append(helper.make_node("Loop", inputs, names, name=names[0], body=graph))
        return tuple(
            Value(name, v.dtype, v.shape, scope) for name, v in zip(names, carried, strict=True)
        )

    def _choice(
        self, scope: Scope, which: Value, true: JSON, false: JSON, operands: Sequence[Value]
    ) -> tuple[Value, ...]:
        """higher_order.cond as If."""
        branches, values = [], []
        for document in (true, false):
            branch = Scope(scope)
            values = [branch.returned(v) for v in self._inline(branch, document, operands)]
            name = scope.new_name("branch")
            branches.append(branch.graph(name, [value_info(v) for v in values]))
        names = [scope.new_name("If") for _ in values]
        scope.nodes.append(
            helper.make_node(
                "If",
                [which.name],
                names,
                name=names[0],
                then_branch=branches[0],
                else_branch=branches[1],
            )
        )
        return tuple(
            Value(name, v.dtype, v.shape, scope) for name, v in zip(names, values, strict=True)
        )

    def _inline(self, scope: Scope, document: JSON, arguments: Sequence[Any]) -> list[Any]:
        remaining = iter(arguments)
        return self._run(scope, document, lambda record: next(remaining))


def make_model(graph: onnx.GraphProto) -> onnx.ModelProto:
    """A model of one graph, in opset `OPSET`. If the graph has products with nested weights, the
    model includes the function that they call.
    """
    functions = [function()] if any(n.domain == DOMAIN for n in every_node(graph)) else []
    opsets = [("", OPSET), *((own.domain, 1) for own in functions)]
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*opset) for opset in opsets],
        ir_version=IR_VERSION,
        producer_name="sirius-compile",
        functions=functions,
    )


def every_node(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph and of its subgraphs."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == a.GRAPH]
    return [*graph.node, *(node for g in inner for node in every_node(g))]


def _sirius(scope: Scope, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    target, row = f"sirius.{name}", OPERATORS.get(name)
    if row is None or row.onnx is None:
        raise UnsupportedModelError(_no_translation(target))
    build = getattr(importlib.import_module(f"sirius_compile.onnx.{row.onnx}"), name)
    known = len(inspect.signature(build).parameters) - 1
    extra = args[known:]
    if any(a is not None for a in extra):
        raise UnsupportedModelError(
            f"onnx: {target} is called with {len(args)} arguments, but its translation takes "
            f"{known}; use --graphs torch for this model"
        )
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    return _applied(build, target, scope, args[:known], kwargs)


def _python(scope: Scope, name: str, args: list[Any], target: str) -> Any:
    if name == "getitem":
        return args[0][args[1]]
    if name in _ON_SIZES and all(isinstance(a, int) for a in args):
        return _ON_SIZES[name](*args)
    if name in _ONNX_ON_SIZES:
        return e.elementwise(scope, _ONNX_ON_SIZES[name], *args)
    raise UnsupportedModelError(_no_translation(target))


def _applied(
    build: Callable[..., Any], target: str, scope: Scope, args: list[Any], kwargs: dict[str, Any]
) -> Any:
    try:
        inspect.signature(build).bind(scope, *args, **kwargs)
    except TypeError as error:
        reason = f"onnx: the translation of {target} does not take these arguments ({error})"
        raise UnsupportedModelError(f"{reason}; use --graphs torch for this model") from error
    try:
        return build(scope, *args, **kwargs)
    except NotImplementedError as error:
        reason = f"onnx: {target} can't be translated ({error})"
        raise UnsupportedModelError(f"{reason}; use --graphs torch for this model") from error


def _no_translation(target: str) -> str:
    return (
        f"onnx: operator {target} has no translation to ONNX; use --graphs torch for this model, "
        "or open an issue with its config.json"
    )
