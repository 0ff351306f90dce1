"""Checks a graph before any of it runs: every call against its operator's schema and rule, and the
outputs against the manifest.

Sizes are propagated through the whole graph as expressions of the entry's shape letters, by the
rules of `graph_operators`. This takes a tenth of a second; torch's own inference (fake tensors)
takes seconds. Calls with the same dtypes and sizes are checked once, so equal layers cost no more
than one. A refused graph raises an ArtifactError that names the node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sirius_runtime.dtypes import dtype_of
from sirius_runtime.entries import INPUTS, PREFILL, RESULTS, extents, needed, signature
from sirius_runtime.errors import ArtifactError
from sirius_runtime.graph import INPUT, WEIGHT, subgraph
from sirius_runtime.graph_memory import Ledger, last_readers, most_bytes
from sirius_runtime.graph_operators import FUNCTIONS, call, operator_name
from sirius_runtime.graph_rules import Array, CallError, Scalar, need
from sirius_runtime.graph_sizes import UNSIGNED, Expression, Size, named, symbol
from sirius_runtime.spec import EntrySpec, ProgramSpec, TensorSpec

_AGAIN = "compile the model again with this version of sirius-compile"
_FUNCTION_RULES = dict(FUNCTIONS.values())
_ATTENTION = {
    torch.ops.sirius.cached_attention.default: 9,
    torch.ops.sirius.block_attention.default: 11,
}
"""Index of the layer number among the arguments."""
_WHILE, _COND = torch.ops.higher_order.while_loop, torch.ops.higher_order.cond
_ITEM = torch.ops.aten.item.default
_CONSTRAIN = torch.ops.aten.sym_constrain_range.default


def check_entries(program: ProgramSpec) -> None:
    """Raises ArtifactError where the manifest's entries are not those that the runtime calls."""
    entries = {entry.name: entry for entry in program.entries}
    for name in needed(program.sparsity):
        if name not in entries:
            raise ArtifactError(f"the program has no entry {name!r}; {_AGAIN}")
    for entry in program.entries:
        expected = signature(entry.name, program.sparsity, program.period.rules)
        if expected is None:
            raise ArtifactError(f"the program has an unknown entry {entry.name!r}; {_AGAIN}")
        sides = (("inputs", entry.inputs, INPUTS), ("outputs", entry.outputs, RESULTS))
        for (side, specs, table), names in zip(sides, expected, strict=True):
            found = [spec.name for spec in specs]
            if len(set(found)) != len(found) or set(found) != names:
                raise ArtifactError(
                    f"entry {entry.name!r} has the {side} {', '.join(found)}; for this sparse path "
                    f"they must be {', '.join(sorted(names))}. {_AGAIN}"
                )
            for spec in specs:
                if spec != table[spec.name]:
                    raise ArtifactError(
                        f"entry {entry.name!r}: {spec.name} is {spec.dtype} {list(spec.shape)}, it "
                        f"must be {table[spec.name].dtype} {list(table[spec.name].shape)}; {_AGAIN}"
                    )


def check_graph(
    program: ProgramSpec, entry: EntrySpec, module: fx.GraphModule, dtype: torch.dtype
) -> None:
    """Raises ArtifactError, naming the node, where a graph can't run in `dtype` on the inputs and
    weights that the manifest declares, or does not return the declared outputs.
    """
    letters: dict[str, Size] = {**extents(program)}
    inputs = {spec.name: _array(spec, letters, dtype) for spec in entry.inputs}
    weights = {
        spec.name: Array(dtype if spec.retype else dtype_of(spec.dtype), spec.shape)
        for spec in program.weights
    }
    given = []
    read: set[str] = set()
    for node in module.graph.find_nodes(op="placeholder"):
        table = weights if WEIGHT in node.meta else inputs
        name = node.meta[WEIGHT] if WEIGHT in node.meta else node.meta[INPUT]
        if name not in table:
            kind = "weight" if table is weights else "input"
            stored = "stored" if table is weights else "an input of the entry"
            raise ArtifactError(
                f"graph {entry.name!r} reads {kind} {name!r}, which is not {stored}; {_AGAIN}"
            )
        if table is inputs and name in read:
            raise ArtifactError(f"graph {entry.name!r} reads input {name!r} twice; {_AGAIN}")
        read.add(name)
        given.append(table[name])
    check = _Check(entry.name, Ledger(most_bytes(program)))
    found = check.run(module, given)
    _check_outputs(entry, found, letters, dtype)
    _check_layers(program, entry, check.layers)


def _check_outputs(
    entry: EntrySpec, found: Any, letters: Mapping[str, Size], dtype: torch.dtype
) -> None:
    if not isinstance(found, tuple) or len(found) != len(entry.outputs):
        raise ArtifactError(
            f"graph {entry.name!r} does not return the {len(entry.outputs)} outputs of the "
            f"manifest; {_AGAIN}"
        )
    if entry.name == PREFILL:
        letters = {**letters, "T": 1}
    for spec, value in zip(entry.outputs, found, strict=True):
        wanted = _array(spec, letters, dtype)
        if value != wanted:
            raise ArtifactError(
                f"graph {entry.name!r}: output {spec.name} is {value!r}, the manifest says "
                f"{wanted}; {_AGAIN}"
            )


def _check_layers(program: ProgramSpec, entry: EntrySpec, used: set[Any]) -> None:
    """Checks that the caches have as many layers as the graph has attentions: more would only take
    memory.
    """
    layers = program.state.layers
    if used and len(used) != layers:
        raise ArtifactError(
            f"graph {entry.name!r} attends in {len(used)} layers, the manifest's state has "
            f"{layers}; {_AGAIN}"
        )


def _array(spec: TensorSpec, letters: Mapping[str, Size], dtype: torch.dtype) -> Array:
    """A tensor as the manifest declares it; a letter without a known size becomes a symbol."""
    shape = [
        extent if isinstance(extent, int) else letters.get(extent, symbol(extent))
        for extent in spec.shape
    ]
    return Array(dtype if spec.dtype == "model" else dtype_of(spec.dtype), tuple(shape))


@dataclass
class _Check:
    """The check of one graph."""

    entry: str
    ledger: Ledger
    layers: set[Any] = field(default_factory=set)  # layer numbers of the attentions
    _results: dict[Any, Any] = field(default_factory=dict)
    _read: int = 0  # numbers that were read off tensors

    def run(self, module: fx.GraphModule, given: Sequence[Any]) -> Any:
        """The graph's result for these arguments."""
        left = iter(given)
        env: dict[fx.Node, Any] = {}
        dead, held = last_readers(module.graph), dict[fx.Node, int]()
        for node in module.graph.nodes:
            try:
                if node.op == "placeholder":
                    env[node] = next(left)
                elif node.op == "get_attr":
                    env[node] = subgraph(node)
                elif node.op == "output":
                    self.ledger.drop(sum(held.values()))
                    return fx.node.map_arg(node.args[0], env.__getitem__)
                else:
                    env[node] = self._call(node, env)
                    held[node] = self.ledger.hold(env[node])
            except CallError as error:
                what = getattr(node.target, "__name__", node.target)
                if isinstance(node.target, torch._ops.OpOverload):
                    what = operator_name(node.target)
                raise ArtifactError(
                    f"graph {self.entry!r}: node {node.name} ({what}) can't run: {error}; {_AGAIN}"
                ) from None
            for one in dead.get(node, ()):
                self.ledger.drop(held.pop(one, 0))
        raise AssertionError("a graph ends in its output")

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        target = node.target
        args, kwargs = _values((node.args, node.kwargs), env)
        if target is _COND or target is _WHILE:
            need(not kwargs, "control flow has no keywords")
            return (self._cond if target is _COND else self._loop)(*_four(args))
        if target is _CONSTRAIN:
            call(target, args, kwargs)
            self._constrain(node, env, kwargs)
            return None
        if target is _ITEM:
            return self._number(call(target, args, kwargs))
        if target in _ATTENTION and len(args) > _ATTENTION[target]:
            self.layers.add(args[_ATTENTION[target]])
        key = (target, _hashable(args), _hashable(kwargs))
        if key not in self._results:
            if target in _FUNCTION_RULES:
                need(not kwargs, "it has no keywords")
                self._results[key] = _apply(_FUNCTION_RULES[target], args)
            else:
                self._results[key] = call(target, args, kwargs)  # type: ignore[arg-type]
        return self._results[key]

    def _number(self, value: Scalar) -> Any:
        """A number read to the host: an integer becomes a size of unknown sign."""
        if value.dtype.is_floating_point or value.dtype is torch.bool:
            return value
        self._read += 1
        return symbol(f"{UNSIGNED}{self._read}")

    def _constrain(self, node: fx.Node, env: dict[fx.Node, Any], kwargs: Mapping[str, Any]) -> None:
        """Takes a size to be 0 or more, and at most `max`: torch checks it when the graph runs."""
        source = node.args[0]
        size, least = env.get(source) if isinstance(source, fx.Node) else None, kwargs.get("min")
        if isinstance(size, Expression) and type(least) is int and least >= 0:
            name = repr(size).replace(UNSIGNED, "n")
            env[source] = named(name)  # type: ignore[index]
            if type(most := kwargs.get("max")) is int:
                self.ledger.bounds[name] = most

    def _cond(self, which: Any, yes: Any, no: Any, given: Any) -> Any:
        _need_flag(which)
        results = [self._inner(branch, given) for branch in (yes, no)]
        need(results[0] == results[1], f"its branches return {results[0]!r} and {results[1]!r}")
        return results[0]

    def _loop(self, goes_on: Any, body: Any, carried: Any, given: Any) -> Any:
        need(isinstance(carried, list | tuple) and isinstance(given, list | tuple), "no operands")
        operands = [*carried, *given]
        flag = self._inner(goes_on, operands)
        _need_flag(flag[0] if isinstance(flag, tuple) and len(flag) == 1 else flag)
        result = self._inner(body, operands)
        need(
            result == tuple(carried),
            f"it carries {carried!r:.200}, its body returns {result!r:.200}",
        )
        return result

    def _inner(self, graph: Any, given: Any) -> Any:
        need(isinstance(graph, fx.GraphModule), "its branch or body is not a graph")
        need(isinstance(given, list | tuple), "it has no list of operands")
        need(all(isinstance(value, Array) for value in given), "its operands must be tensors")
        count = len(graph.graph.find_nodes(op="placeholder"))
        need(count == len(given), f"its graph takes {count} arguments, {len(given)} are given")
        return self.run(graph, given)


def _need_flag(value: Any) -> None:
    is_flag = isinstance(value, Array) and value.dtype is torch.bool
    need(
        is_flag and all(size == 1 for size in value.shape),
        f"its condition {value!r} is not a bool of one element",
    )


def _four(args: Sequence[Any]) -> Sequence[Any]:
    need(len(args) == 4, f"control flow takes four arguments, found {len(args)}")
    return args


def _apply(rule: Any, args: Sequence[Any]) -> Any:
    try:
        return rule(*args)
    except TypeError:
        raise CallError("it is called with arguments that it does not take") from None


def _values(value: Any, env: Mapping[fx.Node, Any]) -> Any:
    """Arguments, with nodes replaced by their values."""
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, list | tuple):
        return tuple(_values(one, env) for one in value)
    if isinstance(value, Mapping):
        return {name: _values(one, env) for name, one in value.items()}
    return value


def _hashable(value: Any) -> Any:
    """A hashable key of arguments, in which 1, 1.0 and True differ."""
    if isinstance(value, tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((name, _hashable(one)) for name, one in value.items())
    if isinstance(value, bool | int | float):
        return (type(value), repr(value))
    return value
