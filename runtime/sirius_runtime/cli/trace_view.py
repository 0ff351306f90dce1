"""The tokens of a trace in reading order, and a trace as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from sirius_runtime.decoder import Way
from sirius_runtime.terminal import plain, styled
from sirius_runtime.trace import Drafted, Emitted, Fate, Finding, Kind, Step, Trace

if TYPE_CHECKING:
    from sirius_runtime.kv_check import CacheCheck


class Role(StrEnum):
    """The role of a token in a step."""

    KEPT = "kept"
    REFUSED = "refused"
    DROPPED = "dropped"
    CORRECTION = "correction"
    BONUS = "bonus"
    DENSE = "dense"


@dataclass(frozen=True)
class Piece:
    """A token as it is shown, with the full and the sparse path's probability of it.

    `sparse` is None for a token that the sparse path did not draft.
    """

    role: Role
    text: str
    full: float | None
    sparse: float | None = None


def pieces(step: Step) -> Iterator[Piece]:
    """The tokens of a step in reading order: the kept ones, the refused ones, the full path's token
    and, in a chain, the tokens dropped after a refused one. A tree's other paths are left out.
    """
    for fate in (Fate.KEPT, Fate.REFUSED):
        for one in step.draft:
            if one.fate is fate:
                yield Piece(Role(fate), name(one), one.full, one.sparse)
    role = Role.DENSE if step.way is Way.DENSE else Role.BONUS
    role = Role.CORRECTION if step.corrects else role
    yield Piece(role, name(step.emitted), step.emitted.full)
    if step.width == 1:
        for one in step.draft:
            if one.fate is Fate.DROPPED:
                yield Piece(Role.DROPPED, name(one), one.full, one.sparse)


def name(token: Drafted | Emitted | Finding) -> str:
    """A token's text, or its id where there is no tokenizer."""
    return f" #{token.token}" if token.text is None else token.text


def probability(value: float | None) -> str:
    """A probability as .973, 1.00, 2e-05 (below .0005) or, for None, a dash."""
    if value is None:
        return "-"
    if value >= 0.9995:
        return "1.00"
    return f"{value:.3f}"[1:] if value >= 0.0005 else f"{value:.0e}"


def describe(finding: Finding) -> str:
    """A finding as one line. Token texts are not escaped for a terminal."""
    this, other = repr(name(finding)), repr(name(finding.instead))
    full, instead = probability(finding.full), probability(finding.instead.full)
    if finding.kind is Kind.OVER_CORRECTION:
        return (
            f"over-correction at token {finding.position}: {this} was refused at {full}, although "
            "it is the full path's likeliest token; the correction is the same token"
        )
    where = "; from here the answer differs from the dense one" if finding.departs else ""
    return (
        f"under-correction at token {finding.position}: {this} was kept at {full}, while the full "
        f"path's likeliest token is {other} ({instead}){where}"
    )


def describe_cache(cache: CacheCheck) -> Iterator[str]:
    """The result of the check of the K/V caches, as lines."""
    most = cache.largest
    if not cache.inconsistent:
        yield (
            f"K/V cache: {cache.slots} slots of {cache.layers} layers match a dense run (largest "
            f"difference {most.size:.1e}, tolerance {cache.tolerance:g})"
        )
    for one in cache.differences:
        yield (
            f"cache inconsistency: {one.tensor} of layer {one.layer}, slot {one.slot}, differs by "
            f"{one.size:.2g} of a slot's norm (tolerance {cache.tolerance:g})"
        )
    if (more := cache.inconsistent - len(cache.differences)) > 0:
        yield f"cache inconsistency: {more} more"


_STYLES = {
    Role.KEPT: "32",
    Role.REFUSED: "31;9",
    Role.DROPPED: "2;9",
    Role.CORRECTION: "1;33",
    Role.BONUS: "1;36",
    Role.DENSE: "35",
}
_MARKS = {
    Role.REFUSED: ("[-", "-]"),
    Role.DROPPED: ("[~", "~]"),
    Role.CORRECTION: ("{+", "+}"),
    Role.BONUS: ("{", "}"),
}
_DIM, _WARNING, _GOOD = "2", "1;31", "32"
_INDENT = "      "


@dataclass(frozen=True)
class View:
    """Steps as lines for a terminal, in colours or, without them, with marks like wdiff's."""

    colour: bool

    def step(self, step: Step) -> str:
        """The lines of a step."""
        what = "dense step"
        if step.way is Way.DRAFT:
            how = "looked up" if step.looked_up else "drafted"
            what = f"{how} {len(step.draft)}, kept {len(step.kept)}, advance {step.advance}"
        if step.width > 1:
            what = f"{what}, width {step.width}"
        lines = [self._styled(f"{step.number:>4}  {what}  {step.seconds * 1e3:.1f} ms", _DIM)]
        if step.reason is not None:
            lines[0] += self._styled(f"  {plain(step.reason)}", _DIM)
        lines.append(_INDENT + "".join(self._pieces(step)))
        if step.corrects:
            refused = ", ".join(
                f"{plain(repr(name(one)))} full {probability(one.full)} sparse "
                f"{probability(one.sparse)}"
                for one in step.draft
                if one.fate is Fate.REFUSED
            )
            emitted = plain(repr(name(step.emitted)))
            lines.append(
                f"{_INDENT}refused {refused}; instead {emitted} full "
                f"{probability(step.emitted.full)}"
            )
        lines += [_INDENT + self._styled(plain(describe(f)), _WARNING) for f in step.findings]
        return "\n".join(lines)

    def end(self, trace: Trace) -> str:
        """The number of findings, and the result of the check of the caches."""
        counts = ", ".join(f"{trace.count(kind)} {kind}s" for kind in list(Kind)[:2])
        lines = [f"found: {counts}"]
        if trace.cache is not None:
            style = _WARNING if trace.cache.inconsistent else _GOOD
            lines += [self._styled(line, style) for line in describe_cache(trace.cache)]
        return "\n".join(lines)

    def _pieces(self, step: Step) -> Iterator[str]:
        for piece in pieces(step):
            text = plain(piece.text)
            if self.colour:
                yield styled(text, _STYLES[piece.role])
            else:
                before, after = _MARKS.get(piece.role, ("", ""))
                yield f"{before}{text}{after}"

    def _styled(self, text: str, style: str) -> str:
        return styled(text, style) if self.colour else text
