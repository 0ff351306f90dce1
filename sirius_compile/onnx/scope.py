"""Builds ONNX graphs. Each graph has a scope, also the body of a Loop and the branches of an If.

A node is put in the outermost scope that has its inputs, so that loop-invariant values are computed
once, before the Loop. Nodes are not moved out of a branch of If, because the branch may not run.
Equal nodes of a scope are merged. A node added with `within` stays in its scope and is not shared
with inner scopes. Weights of kernels that pack them need this: ONNX Runtime tells a kernel only
about constants of its own graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from sirius_runtime.onnx_files import expert_name
from sirius_runtime.spec import SiteSpec

Extent = int | str | None
"""The size of a dimension, its letter if symbolic, or None if unknown before the graph runs."""

Shape = tuple[Extent, ...]

TYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
"""ONNX's numbers for the dtypes of lowered graphs."""

_BLOCK_BYTES = 1024  # the largest constant; larger tensors are computed, or are weights


class View(NamedTuple):
    """A part of a weight that a value equals: every `step`th element of [start, end) along an axis
    of the weight, and then its transpose if `transposed`.
    """

    weight: Value
    axis: int
    start: int
    end: int
    transposed: bool
    step: int = 1


@dataclass(frozen=True)
class Value:
    """A tensor of an ONNX graph.

    `letter`: the symbolic size that a scalar holds. `view`: the part of a weight that the value
    equals, if it is one; products read that part in place.
    """

    name: str
    dtype: str
    shape: Shape
    scope: Scope = field(repr=False, compare=False)
    letter: str | None = field(default=None, repr=False, compare=False)
    view: View | None = field(default=None, repr=False, compare=False)

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Kept:
    """A weight whose rows are kept or skipped by prompt, and the graph's input with the kept rows.

    `name`: the input's name. `part`: a field of `Mlp` (`gate`, `up_bias`, …). `weight`: the rows
    [I, C] of all neurons in a weight, or a bias [I]. The input is [B, C, K] for `gate` and `up`, so
    that the product reads it in order, [B, K, C] for `down`, and [B, 1, K] for a bias.
    """

    name: str
    part: str
    layer: int
    weight: View


class Scope:
    """One ONNX graph under construction."""

    def __init__(
        self,
        parent: Scope | None = None,
        *,
        repeats: bool = False,
        sites: Sequence[SiteSpec] = (),
    ) -> None:
        """`repeats`: whether this is a Loop's body, whose invariant nodes go to `parent`. `sites`:
        the program's sparse sites, given to the outermost graph.
        """
        self.parent, self._repeats = parent, repeats
        self.root: Scope = self if parent is None else parent.root
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        self._made: dict[object, tuple[Value, ...]] = {}
        if parent is None:
            self._names = 0
            self.reshaped: dict[str, Value] = {}
            """Input of the Reshape that made a value, by the value's name."""
            self.initializers: dict[str, onnx.TensorProto] = {}
            self._constants: dict[object, Value] = {}
            self._letters: dict[str, tuple[Value, int]] = {}
            self.sites = sites
            self.kept: dict[str, Kept] = {}
            """The inputs that the graph `select` computes, in order."""
            self.new_kv: tuple[list[Value], list[Value]] = [], []
            """K and V of the call's tokens by layer, which the caller writes to the caches."""

    # values without a node

    def input(self, name: str, dtype: str, shape: Sequence[Extent]) -> Value:
        """A named input of this graph."""
        value = Value(name, dtype, tuple(shape), self)
        if name not in self.inputs:
            self.inputs[name] = value_info(value)
            for axis, letter in enumerate(shape):
                if self.parent is None and isinstance(letter, str):
                    self._letters.setdefault(letter, (value, axis))
        return value

    def size(self, letter: str) -> Value:
        """A symbolic size by its letter, an int64 scalar."""
        value, axis = self.root._letters[letter]
        one = self.op("Shape", value, shape=(1,), dtype="int64", start=axis, end=axis + 1)
        size = self.op("Squeeze", one, self.constant([0], "int64"), shape=())
        return replace(size, letter=letter)

    def lettered(self, value: Value) -> Value:
        """`value` with new letters for its unknown sizes, so that derived shapes have them too."""
        shape = list(value.shape)
        for axis, extent in enumerate(shape):
            if extent is None:
                shape[axis] = letter = self.new_name("size")
                self.root._letters[letter] = (value, axis)
        return replace(value, shape=tuple(shape))

    def weight(self, name: str, dtype: str, shape: Sequence[int]) -> Value:
        """A weight; its bytes are bound when the graph is packaged (`package.bind`)."""
        if name not in self.root.initializers:
            tensor = TensorProto(name=name, data_type=TYPES[dtype], dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            self.root.initializers[name] = tensor
        value = Value(name, dtype, tuple(shape), self.root)
        rows = shape[0] if shape else 0
        return replace(value, view=View(value, 0, 0, rows, transposed=False))

    def expert(self, weight: Value, index: int) -> Value:
        """One expert's matrix of a weight [E, …], as its own initializer over the same bytes."""
        _, *shape = weight.shape
        return self.weight(expert_name(weight.name, index), weight.dtype, shape)  # type: ignore[arg-type]

    def constant(self, value: Any, dtype: str) -> Value:
        """A small constant array."""
        array = np.asarray(value, dtype=dtype)
        assert array.nbytes <= _BLOCK_BYTES, "a large constant belongs to the weights"
        key = (array.tobytes(), array.shape, dtype)
        root = self.root
        if key not in root._constants:
            name = self.new_name("constant")
            root.initializers[name] = onnx.numpy_helper.from_array(array, name)
            root._constants[key] = Value(name, dtype, array.shape, root)
        return root._constants[key]

    def new_name(self, hint: str) -> str:
        """A name that is unique in the whole model."""
        root = self.root
        root._names += 1
        return f"{hint}_{root._names}"

    # nodes

    def op(
        self,
        kind: str,
        *inputs: Value | None,
        shape: Sequence[Extent],
        dtype: str | None = None,
        within: bool = False,
        **attributes: Any,
    ) -> Value:
        """Adds a node with one output. `dtype`: by default that of the first input. `within`: keep
        the node in this scope.
        """
        if dtype is None:
            assert inputs[0] is not None
            dtype = inputs[0].dtype
        outputs = [(dtype, tuple(shape))]
        (value,) = self.ops(kind, *inputs, outputs=outputs, within=within, **attributes)
        return value

    def ops(
        self,
        kind: str,
        *inputs: Value | None,
        outputs: Sequence[tuple[str, Shape]],
        within: bool = False,
        **attributes: Any,
    ) -> tuple[Value, ...]:
        """Adds a node with several `outputs` (dtype, shape), or returns an equal node's outputs."""
        home = self
        while home.parent is not None and home._repeats and not within:
            if any(v is not None and v.scope.depth >= home.depth for v in inputs):
                break
            home = home.parent
        key = (
            kind,
            tuple(v.name if v else "" for v in inputs),
            tuple(outputs),
            repr(sorted(attributes.items())),
        )
        found: Scope | None = home
        while found is not None:
            if key in found._made:
                return found._made[key]
            found = None if within else found.parent
        names = [self.new_name(kind) for _ in outputs]
        while inputs and inputs[-1] is None:  # trailing optional inputs are left out
            inputs = inputs[:-1]
        home.nodes.append(
            helper.make_node(
                kind,
                [v.name if v else "" for v in inputs],
                names,
                # ONNX Runtime up to 1.20 names a fused node after its parts, so names must differ.
                name=names[0],
                **attributes,
            )
        )
        made = tuple(
            Value(name, dtype, shape, home)
            for name, (dtype, shape) in zip(names, outputs, strict=True)
        )
        home._made[key] = made
        return made

    def returned(self, value: Value, name: str | None = None) -> Value:
        """`value` as an output of this graph, through an Identity node in it."""
        name = name or self.new_name("output")
        self.nodes.append(helper.make_node("Identity", [value.name], [name], name=name))
        return replace(value, name=name, scope=self, view=None)

    def graph(self, name: str, outputs: Sequence[onnx.ValueInfoProto]) -> onnx.GraphProto:
        """The finished graph, with only the nodes that the outputs need."""
        nodes = _needed(self.nodes, [o.name for o in outputs])
        used = {name for node in nodes for name in reads(node)}
        inputs = [v for n, v in self.inputs.items() if n in used or self.parent is not None]
        initializers = []
        if self.parent is None:
            initializers = [t for n, t in self.initializers.items() if n in used]
        return helper.make_graph(nodes, name, inputs, list(outputs), initializers)


def value_info(value: Value, shape: Sequence[Extent] | None = None) -> onnx.ValueInfoProto:
    """The type of a graph's input or output. `shape`: replaces `value.shape`, if more is known."""
    shape = value.shape if shape is None else shape
    return helper.make_tensor_value_info(value.name, TYPES[value.dtype], list(shape))


def reads(node: onnx.NodeProto) -> set[str]:
    """The names that a node reads, including those read in its subgraphs."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            names |= {name for inner in attribute.g.node for name in reads(inner)}
    return names


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes that the outputs need, in order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= reads(node)
            kept.append(node)
    return kept[::-1]
