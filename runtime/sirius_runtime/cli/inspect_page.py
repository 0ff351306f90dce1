"""`sirius inspect --html`: an artifact as one HTML page.

A graph is drawn as its calls in the order of evaluation, one per line. Wires on the left connect a
call with the calls whose values it reads. Identical layers are drawn once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sirius_runtime.cli.page import document, escaped
from sirius_runtime.graph_view import Graph, Row, Section, difference, sections
from sirius_runtime.spec import Manifest, PassRecord

_STYLE = Path(__file__).with_name("inspect_page.css")
_BASE = "full"  # the entry that the others are compared with
_LINE = 20  # height of a call's line, in pixels
_LEFT, _WIDTH = 150, 1600  # width of the wires and of a drawing, in pixels
_SHOWN = 150  # characters of a call's arguments that are shown
_DRAWN = 3000  # calls of a section that are drawn; `sirius inspect --graph` prints all
_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "einsum", "embedding")


def page(manifest: Manifest, lines: Sequence[str], graphs: Mapping[str, Graph]) -> str:
    """The HTML page of an artifact. `lines`: the output of `sirius inspect`; `graphs`: by entry."""
    program = manifest.program
    body = [f"<h1>{escaped(program.model.source)}</h1>"]
    body += ["<h2>Contents</h2>", _preformatted(lines)]
    body += ["<h2>Passes</h2>", *_passes(program.passes)]
    if _BASE in graphs:
        for name, graph in graphs.items():
            if name != _BASE and name != "period":
                changes = list(difference((_BASE, graphs[_BASE]), (name, graph)))
                body += [f"<h2>{escaped(name)} compared with {_BASE}</h2>", _changes(changes)]
    body += ["<h2>Graphs</h2>"] if graphs else []
    for name, graph in graphs.items():
        body += _graph(name, graph)
    body.append(
        "<footer>Made by sirius inspect. A ring marks a call that reads a value from outside its "
        "drawing. Hover over a call for its name and all of its arguments.</footer>"
    )
    return document(f"{program.model.source} inspected", _STYLE, body)


def _preformatted(lines: Sequence[str]) -> str:
    return f'<div class="panel"><pre>{escaped(chr(10).join(lines))}</pre></div>'


def _passes(passes: Sequence[PassRecord]) -> Iterator[str]:
    """One line per pass: its rewrites, and the number of nodes of all graphs before and after."""
    most = max((max(p.nodes_before, p.nodes_after) for p in passes), default=0) or 1
    yield '<div class="panel"><table><tr>'
    yield "".join(f"<th>{h}</th>" for h in ("pass", "rewrites", "nodes before", "after", ""))
    yield "</tr>"
    for one in passes:
        width = 260 * one.nodes_after / most
        bar = (
            f'<svg width="260" height="8"><rect class="bar" width="{width:.1f}" height="8"/></svg>'
        )
        cells = (one.name, one.rewrites, one.nodes_before, one.nodes_after)
        row = "".join(f"<td>{escaped(cell)}</td>" for cell in cells)
        yield f"<tr>{row}<td>{bar}</td></tr>"
    yield "</table></div>"


def _changes(lines: Sequence[str]) -> str:
    kinds = {"+": "added", "-": "gone", "#": "head"}
    spans = (
        f'<span class="{"head" if line[:3] in ("---", "+++") else kinds.get(line[:1], "same")}">'
        f"{escaped(line)}</span>"
        for line in lines
    )
    return f'<div class="panel"><pre>{"".join(spans)}</pre></div>'


def _graph(name: str, graph: Graph) -> Iterator[str]:
    about = f"{len(graph.rows)} calls over {graph.weights} weights"
    yield f'<details class="panel"><summary>{escaped(name)} <span class="soft">{about}</span>'
    yield f'</summary><p class="soft">takes {escaped(", ".join(graph.inputs))}</p>'
    for (section,) in sections(graph):
        yield f"<h3>{escaped(section.title)}</h3>"
        yield from _drawing(section)
    yield f'<p class="soft">returns {escaped(graph.returns)}</p></details>'


def _drawing(section: Section) -> Iterator[str]:
    rows = section.rows[:_DRAWN]
    place = {row.name: index for index, row in enumerate(rows)}
    yield f'<svg role="img" width="{_WIDTH}" height="{_LINE * len(rows)}">'
    for index, row in enumerate(rows):
        yield from _call(index, row, place)
    yield "</svg>"
    if more := len(section.rows) - len(rows):
        yield f'<p class="soft">and {more} more calls</p>'
    for row in rows:
        if row.inner:
            yield f"<details><summary>{escaped(row.name)}</summary>"
            yield f"<pre>{escaped(chr(10).join(row.inner))}</pre></details>"


def _call(index: int, row: Row, place: Mapping[str, int]) -> Iterator[str]:
    """A call's line, and the wires from its operands that are drawn above it."""
    y = index * _LINE + _LINE / 2
    short = row.target.removeprefix("aten.").removesuffix(".default")
    arguments = row.arguments if len(row.arguments) <= _SHOWN else f"{row.arguments[:_SHOWN]}…"
    ours, operator = row.target.startswith("sirius."), short.partition(".")[0]
    kind = "ours" if ours else "product" if operator in _PRODUCTS else "other"
    yield f'<g class="{kind}"><title>{escaped(row.lines[0])}</title>'
    outer = False
    for name in row.reads:
        above = place.get(name, index)
        if above < index:
            top = above * _LINE + _LINE / 2
            x = _LEFT - min(_LEFT - 10, 10 + 9 * (index - above) ** 0.6)
            yield (f'<path class="wire" d="M{_LEFT} {top}C{x:.1f} {top} {x:.1f} {y} {_LEFT} {y}"/>')
        outer |= above == index
    ring = ' class="outer"' if outer else ""
    yield f'<circle cx="{_LEFT}" cy="{y}" r="4"{ring}/>'
    yield (
        f'<text x="{_LEFT + 12}" y="{y + 4}"><tspan class="target">{escaped(short)}</tspan> '
        f'<tspan class="arguments">{escaped(arguments)}</tspan></text></g>'
    )
