"""Prints graph documents, one line per call, with equal layers printed once; and their differences.

Documents are read as JSON, without PyTorch. One that is not a graph document raises ArtifactError.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sirius_runtime.errors import ArtifactError
from sirius_runtime.spec import JSON

_LAYER = re.compile(r"\.(\d+)\.")
BEFORE, AFTER = -1, sys.maxsize
"""Used instead of a layer number, for calls before and after the layers."""
_MOST_DEPTH = 5  # of graphs within graphs


@dataclass(frozen=True)
class Row:
    """A call: its `name`, its `target`, its `arguments` as text, and the names of the nodes that it
    `reads`. `layer`: the layer of the weights that it reads, None if they belong to no layer;
    `weighs`: whether it reads any weight. `inner`: the lines of a subgraph of control flow.
    """

    name: str
    target: str
    arguments: str
    reads: tuple[str, ...]
    layer: int | None
    weighs: bool
    inner: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        call = f"%{self.name} = {self.target}({self.arguments})"
        return (call, *(f"    {line}" for line in self.inner))


@dataclass(frozen=True)
class Section:
    """The calls before or after the layers, or of the layers `first` to `last`, which are equal
    except for their weights. `rows` are the calls of layer `first`.
    """

    rows: tuple[Row, ...]
    first: int
    last: int

    @property
    def title(self) -> str:
        if self.first in (BEFORE, AFTER):
            return "before the layers" if self.first == BEFORE else "after the layers"
        if self.first == self.last:
            return f"layer {self.first}"
        return f"layers {self.first} to {self.last}, which are alike: layer {self.first}"


@dataclass(frozen=True)
class Graph:
    """A graph: its inputs, its calls, what it returns (as text), and the number of its weights."""

    inputs: tuple[str, ...]
    rows: tuple[Row, ...]
    returns: str
    weights: int


def read_graph(document: JSON) -> Graph:
    """The `Graph` of a document. Raises ArtifactError for what is not a graph document."""
    try:
        return _read(document, 0)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"not a graph document ({error!r:.200})") from error


def _read(document: JSON, depth: int) -> Graph:
    if depth > _MOST_DEPTH:
        raise ArtifactError("not a graph document (graphs within graphs without end)")
    shown: dict[str, str] = {}  # the text of each node in the arguments of others
    inputs, rows, returns = [], [], ""
    bound: dict[str, str] = {}  # weights by their nodes' names
    for node in document["nodes"]:
        name, op = str(node["name"]), node["op"]
        shown[name] = f"%{name}"
        if op in ("weight", "input"):
            shown[name] = str(node["bound"])
            if op == "weight":
                bound[name] = shown[name]
            else:
                inputs.append(shown[name])
        elif op == "argument":
            inputs.append(shown[name])
        elif op == "graph":
            inner = _read(node["graph"], depth + 1)
            lines = [line for row in inner.rows for line in row.lines]
            given = ", ".join(inner.inputs)
            rows.append(
                Row(name, "graph", given, (), None, False, (*lines, f"return {inner.returns}")),
            )
        elif op == "output":
            returns = _text(node["args"], shown)
        else:
            rows.append(_row(node, shown, bound))
    return Graph(tuple(inputs), tuple(rows), returns, len(bound))


def _row(node: JSON, shown: dict[str, str], bound: dict[str, str]) -> Row:
    arguments = [_text(argument, shown) for argument in node["args"]]
    arguments += [f"{key}={_text(value, shown)}" for key, value in node.get("kwargs", {}).items()]
    reads = tuple(dict.fromkeys(_reads([node["args"], node.get("kwargs", {})])))
    weights = [bound[name] for name in reads if name in bound]
    layers = (_LAYER.search(weight) for weight in weights)
    layer = next((int(found[1]) for found in layers if found), None)
    name, target = str(node["name"]), str(node["target"])
    return Row(name, target, ", ".join(arguments), reads, layer, bool(weights))


def _reads(value: JSON) -> Iterator[str]:
    """The names of the nodes in an argument."""
    if isinstance(value, list):
        for one in value:
            yield from _reads(one)
    elif isinstance(value, dict):
        if list(value) == ["node"]:
            yield value["node"]
        else:
            yield from _reads(list(value.values()))


def _text(value: JSON, shown: dict[str, str]) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_text(one, shown) for one in value)}]"
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        return shown[content] if kind == "node" else str(content)
    return json.dumps(value, ensure_ascii=False)


def _parts(graph: Graph) -> dict[int, list[Row]]:
    """The rows of each layer, of `BEFORE` and of `AFTER`.

    A row that reads no layer's weight belongs to the layer whose weight was read last. So a layer
    begins where its first norm's weight is read, and ends where the next layer's is.
    """
    last = max((row.layer for row in graph.rows if row.layer is not None), default=BEFORE)
    parts: dict[int, list[Row]] = {}
    at = BEFORE
    for row in graph.rows:
        if row.layer is not None:
            at = max(at, row.layer)
        elif at == last != BEFORE and row.weighs:
            at = AFTER
        parts.setdefault(at, []).append(row)
    return parts


def _form(rows: Sequence[Row], layer: int) -> tuple[str, ...]:
    """The rows as text, without what may differ between equal layers: names of calls, the layer's
    number, and decimal numbers (calibrated thresholds).
    """
    place = {row.name: f"%{index}" for index, row in enumerate(rows)}
    form = []
    for row in rows:
        text = "\n".join((row.target, row.arguments, *row.inner))
        text = re.sub(r"%(\w+)", lambda m: place.get(m[1], "%outer"), text)
        text = re.sub(r"-?\d+\.\d+(e-?\d+)?", "#", text)
        text = text.replace(f".{layer}.", ".N.")
        if row.target.startswith("sirius."):  # these operators have the layer number as argument
            text = re.sub(rf"(?<![\w.]){layer}(?![\w.])", "N", text)
        form.append(text)
    return tuple(form)


def sections(*graphs: Graph) -> list[tuple[Section, ...]]:
    """The sections of several graphs side by side. Successive layers are one section if they are
    equal in each graph.
    """
    parts = [_parts(graph) for graph in graphs]
    found: list[tuple[Section, ...]] = []
    before: object = None
    for layer in sorted({layer for part in parts for layer in part}):
        rows = [tuple(part.get(layer, ())) for part in parts]
        form = [_form(one, layer) for one in rows]
        if form == before:
            found[-1] = tuple(Section(s.rows, s.first, layer) for s in found[-1])
        else:
            found.append(tuple(Section(one, layer, layer) for one in rows))
        before = form if layer != BEFORE else None
    return found


def lines_of(name: str, graph: Graph) -> Iterator[str]:
    """The lines of a printed graph."""
    yield f"{name}({', '.join(graph.inputs)}): {len(graph.rows)} calls over {graph.weights} weights"
    for (section,) in sections(graph):
        yield f"# {section.title}"
        for row in section.rows:
            yield from row.lines
    yield f"return {graph.returns}"


def difference(first: tuple[str, Graph], second: tuple[str, Graph]) -> Iterator[str]:
    """The difference of two graphs: lines of a unified diff, by section. Layers that differ in the
    same way are printed once.
    """
    (name, one), (other_name, other) = first, second
    yield f"--- {name}: {len(one.rows)} calls over {one.weights} weights"
    yield f"+++ {other_name}: {len(other.rows)} calls over {other.weights} weights"
    texts = [
        (left.title, *([line for row in side.rows for line in row.lines] for side in (left, right)))
        for left, right in sections(one, other)
    ]
    texts.append(("what they return", [f"return {one.returns}"], [f"return {other.returns}"]))
    changed = False
    for title, before, after in texts:
        if before != after:
            changed = True
            yield f"# {title}"
            changes = difflib.unified_diff(before, after, lineterm="", n=1)
            yield from (line for line in changes if not line.startswith(("@@", "---", "+++")))
    if not changed:
        yield "no difference"
