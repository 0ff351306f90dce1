"""A trace as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sirius_runtime.cli.page import document, escaped
from sirius_runtime.cli.results import figure
from sirius_runtime.cli.trace_view import (
    Piece,
    Role,
    describe,
    describe_cache,
    name,
    pieces,
    probability,
)
from sirius_runtime.decoder import Way
from sirius_runtime.text import IncrementalDecoder
from sirius_runtime.trace import Kind, Step, Trace

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_STYLE = Path(__file__).with_name("trace_page.css")
_LEGEND = {
    Role.KEPT: "drafted and kept",
    Role.REFUSED: "refused",
    Role.DROPPED: "dropped after a refused one",
    Role.CORRECTION: "correction",
    Role.BONUS: "bonus, after a kept draft",
    Role.DENSE: "dense step",
}
_WIDTH, _HEIGHT = 1000, 96  # of the chart, in pixels; many steps make it wider
_THIN, _THICK = 9, 36  # least and greatest width of a bar with its gap, in pixels


def page(output: Any, tokenizer: Tokenizer | None) -> str:
    """The HTML page of `output`, a `GenerationOutput` that has a trace."""
    trace: Trace = output.trace
    body = (
        *_head(trace),
        *_tiles(trace, output.stats),
        *_answer(trace, tokenizer),
        *((*_chart(trace), *_steps(trace)) if trace.steps else ()),
        "<footer>Made by sirius trace. Hover over a token for its numbers. full and sparse: the "
        "token's probability in the full and in the sparse path.</footer>",
    )
    return document(f"{trace.model['source']} traced", _STYLE, body)


def _shown(text: str) -> str:
    """A token's text on one line."""
    return escaped(text.replace("\n", "↵").replace("\t", "⇥"))


def _head(trace: Trace) -> Iterator[str]:
    model = trace.model
    yield f"<h1>{escaped(model['source'])}</h1>"
    yield (
        f'<p class="sub">{escaped(model["model_type"])}, {model["parameters"]:,} parameters in '
        f"{escaped(model['dtype'])} on {escaped(model['device'])}; sparse path "
        f"{escaped(model['method'])}, kept share {model['keep']:g}, density "
        f"{model['density']:.3f}</p>"
    )
    items = (
        f"<li><span>{escaped(key.replace('_', ' '))}</span> <b>{escaped(_setting(value))}</b></li>"
        for key, value in trace.settings.items()
        if value is not None
    )
    yield f'<ul class="settings">{"".join(items)}</ul>'


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):
        return ", ".join(f"{key} {one:g}" for key, one in value.items())
    return str(value)


def _tiles(trace: Trace, stats: Any) -> Iterator[str]:
    def tile(value: str, label: str, kind: str = "") -> str:
        return (
            f'<div class="tile {kind}"><b>{escaped(value)}</b><span>{escaped(label)}</span></div>'
        )

    yield '<div class="tiles">'
    yield tile(str(len(trace.tokens)), "tokens")
    yield tile(str(stats.periods), "periods")
    yield tile(figure(stats.aal, 2), "AAL")
    share = stats.acceptance_rate
    yield tile("-" if share is None else f"{share:.0%}", "of drafted tokens kept")
    yield tile(figure(stats.effective_density, 3), "effective density")
    if stats.dense_tokens:
        yield tile(str(stats.dense_tokens), "dense steps")
    for kind in (Kind.OVER_CORRECTION, Kind.UNDER_CORRECTION):
        count = trace.count(kind)
        yield tile(str(count), f"{kind}{'' if count == 1 else 's'}", "found" if count else "")
    if trace.cache is not None:
        wrong = trace.cache.inconsistent
        yield tile(str(wrong) if wrong else "sound", "K/V cache", "found" if wrong else "sound")
    yield "</div>"
    if trace.cache is not None:
        sound = "" if trace.cache.inconsistent else " sound"
        yield from (
            f'<p class="finding{sound}">{escaped(line)}</p>' for line in describe_cache(trace.cache)
        )


def _answer(trace: Trace, tokenizer: Tokenizer | None) -> Iterator[str]:
    decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, trace.prompt)
    suspects = {f.position for f in trace.findings if f.kind is Kind.UNDER_CORRECTION}

    def token(place: int, id: int, piece: Piece, target: str) -> str:
        text = f" #{id}" if decoder is None else decoder.add(id)
        if not text:  # a special token, or a character that is not complete yet
            return ""
        suspect = " under-correction" if place in suspects else ""
        about = f'class="{piece.role}{suspect}" title="{_numbers(piece)}"'
        inner = f"<span {about}>{escaped(text)}</span>"
        return f'<a href="#{target}">{inner}</a>' if target else inner

    spans = [token(0, trace.first.token, Piece(Role.BONUS, name(trace.first), None), "")]
    for step in trace.steps:
        committed = (p for p in pieces(step) if p.role not in (Role.REFUSED, Role.DROPPED))
        for place, (id, piece) in enumerate(zip(step.tokens, committed, strict=False)):
            spans.append(token(step.position + place, id, piece, f"s{step.number}"))
    if decoder is not None:
        spans.append(escaped(decoder.flush()))
    yield "<h2>Answer</h2>"
    yield '<div class="panel">'
    if trace.prompt_text is not None:
        yield f"<details><summary>prompt, {len(trace.prompt)} tokens</summary>"
        yield f'<pre class="answer">{escaped(trace.prompt_text)}</pre></details>'
    yield f'<pre class="answer">{"".join(spans)}</pre>'
    yield '<div class="legend">'
    used = {piece.role for step in trace.steps for piece in pieces(step)}
    for role, meaning in _LEGEND.items():
        if role in used:
            yield f'<span class="chip {role}">{escaped(meaning)}</span>'
    yield "</div></div>"


def _numbers(piece: Piece) -> str:
    """The tooltip of a token."""
    numbers = f"{_LEGEND[piece.role]}; full {probability(piece.full)}"
    if piece.sparse is not None:
        numbers += f", sparse {probability(piece.sparse)}"
    return escaped(f"{piece.text!r}: {numbers}")


def _chart(trace: Trace) -> Iterator[str]:
    """One bar per step: the tokens that it committed, of those that it could have committed."""
    most = max((step.period for step in trace.steps), default=1)
    unit = _HEIGHT / most
    bar = max(_THIN, min(_THICK, _WIDTH // max(len(trace.steps), 1)))
    yield "<h2>Advance of each step</h2>"
    yield (
        '<div class="panel chart"><svg role="img" aria-label="tokens that each step committed" '
        f'width="{bar * len(trace.steps)}" height="{_HEIGHT + 14}">'
    )
    for index, step in enumerate(trace.steps):
        x, size, did = index * bar, _levels(step) + 1, step.advance
        kind = "dense" if step.way is Way.DENSE else "period"
        mark = f'<circle class="mark" cx="{x + bar / 2 - 1}" cy="{_HEIGHT + 8}" r="3"/>'
        yield (
            f'<a href="#s{step.number}"><title>step {step.number}: advance {did} of {size}</title>'
            f"{_rect('lost', x, bar, size * unit)}{_rect(kind, x, bar, did * unit)}"
            f"{mark * bool(step.findings)}</a>"
        )
    yield "</svg></div>"


def _rect(kind: str, x: int, bar: int, height: float) -> str:
    return (
        f'<rect class="{kind}" x="{x}" y="{_HEIGHT - height:.1f}" width="{bar - 2}" '
        f'height="{height:.1f}" rx="1.5"/>'
    )


def _levels(step: Step) -> int:
    """The depth of the draft."""
    return max((one.depth for one in step.draft), default=0)


def _steps(trace: Trace) -> Iterator[str]:
    yield "<h2>Steps</h2>"
    yield '<input type="checkbox" id="only">'
    yield '<label class="filter" for="only">only those with a refusal or a finding</label>'
    yield '<div class="steps">'
    for step in trace.steps:
        yield from _step(step)
    yield "</div>"


def _step(step: Step) -> Iterator[str]:
    dense = step.way is Way.DENSE
    quiet = not (step.corrects or step.findings)
    yield f'<article class="step{" dense" * dense}{" plain" * quiet}" id="s{step.number}">'
    yield f"<header><b>{step.number}</b>"
    if dense:
        yield f"<span>dense step: {escaped(step.reason or 'the full path alone')}</span>"
    else:
        share = 120 * step.advance / (_levels(step) + 1)
        tree = f" in a tree of width {step.width}" if step.width > 1 else ""
        yield (
            '<svg width="120" height="6"><rect width="120" height="6" rx="3"/>'
            f'<rect class="did" width="{share:.1f}" height="6" rx="3"/></svg>'
            f"<span>drafted {len(step.draft)}{tree}, kept {len(step.kept)}, advance "
            f"{step.advance}</span>"
        )
    yield f'<span class="time">{step.seconds * 1e3:.1f} ms</span></header>'
    yield f'<div class="chips">{"".join(map(_chip, pieces(step)))}</div>'
    yield from (f'<p class="finding">{escaped(describe(finding))}</p>' for finding in step.findings)
    if step.width > 1 and step.draft:
        yield f"<details><summary>all {len(step.draft)} nodes of the tree</summary>"
        yield from _table(step)
        yield "</details>"
    yield "</article>"


def _chip(piece: Piece) -> str:
    bars = numbers = ""
    if piece.full is not None:
        numbers = probability(piece.full)
        bars = '<rect class="back" width="100" height="2"/>' + _bar("full", 0, piece.full)
    if piece.sparse is not None:
        numbers += f" · {probability(piece.sparse)}"
        bars += '<rect class="back" y="3" width="100" height="2"/>'
        bars += _bar("sparse", 3, piece.sparse)
    svg = f'<svg viewBox="0 0 100 5" preserveAspectRatio="none">{bars}</svg>'
    return (
        f'<span class="chip {piece.role}" title="{_numbers(piece)}"><span class="t">'
        f"{_shown(piece.text)}</span><small>{numbers}</small>{svg if bars else ''}</span>"
    )


def _bar(kind: str, y: int, share: float) -> str:
    return f'<rect class="{kind}" y="{y}" width="{100 * share:.1f}" height="2"/>'


def _table(step: Step) -> Iterator[str]:
    yield "<table><tr>"
    yield "".join(f"<th>{h}</th>" for h in ("node", "after", "token", "full", "sparse", "fate"))
    yield "</tr>"
    for one in step.draft:
        cells: Iterable[object] = (
            one.node,
            one.parent,
            _shown(name(one)),
            probability(one.full),
            probability(one.sparse),
        )
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        yield f'<tr>{row}<td class="{one.fate}">{one.fate}</td></tr>'
    yield "</table>"
