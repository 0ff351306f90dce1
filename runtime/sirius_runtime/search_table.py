"""The table of settings that the compiler's search measured, as lines of text."""

from __future__ import annotations

from sirius_runtime.spec import Method, SearchSpec, SettingSpec

_HEAD = "method        keep  density   agree  period  conf.    AAL  effective (95%)"


def search_table(search: SearchSpec) -> list[str]:
    """A line about the search, a head, and a line for each setting, of at most 80 columns; `*`
    marks the chosen one.
    """
    first = search.settings[search.chosen]
    asked = "" if search.agreement is None else f"; asked: {search.agreement:.1%} or more agree"
    about = f"{first.drafts} drafts of each setting on {first.texts} held-out texts{asked}"
    rows = (_row(one, index == search.chosen) for index, one in enumerate(search.settings))
    return [about, "  " + _HEAD, *rows]


def _row(one: SettingSpec, chosen: bool) -> str:
    best, (low, high) = one.best, one.interval
    keep = "" if one.method is Method.NONE else f"{one.keep:.3g}"
    return (
        f"{'*' if chosen else ' '} {one.method:12}  {keep:>4}  {one.density:7.3f}  "
        f"{one.agreement:6.1%}  {best.period:6}  {best.confidence:5g}  {best.aal:5.2f}  "
        f"{best.effective_density:.3f} ({low:.3f}-{high:.3f})"
    )
