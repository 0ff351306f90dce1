"""The settings among which `sirius tune` chooses, its choice, and the defaults that follow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sirius_runtime.entries import PERIOD
from sirius_runtime.errors import ConfigError
from sirius_runtime.evaluation.ablate import Axis
from sirius_runtime.evaluation.modes import Setting, Value, setting_of
from sirius_runtime.evaluation.summary import Summary
from sirius_runtime.request import Mode
from sirius_runtime.rules import OPTIONS, options_of
from sirius_runtime.spec import PeriodSpec, ProgramSpec

THRESHOLDS = (0.05, 0.1, 0.3)
CONFIDENCE = 0.3
"""The confidence that is tried besides none, where the artifact has none."""
_SHORTEST = 2  # tokens: a shorter period drafts nothing
_LONGEST = 64
_SLACK = 1e-9  # points: rounding of means
_COMPILED = ("period", "tree_width")  # sizes of the graph of a whole period


@dataclass(frozen=True)
class Choice:
    """The setting that was chosen, and its results. pays: whether it is faster than mode full."""

    setting: Setting
    summary: Summary
    pays: bool


def grid(program: ProgramSpec, axes: Sequence[Axis] = ()) -> tuple[Setting, ...]:
    """Every combination of the axes' values: mode exact without threshold, and mode sirius.

    Axes that are not given: three thresholds; half the artifact's period, that period and the
    double; with and without confidence. Raises ConfigError for an axis that an artifact has no
    default of, or cannot change: an artifact with the graph of a whole period keeps the sizes that
    this graph was compiled for.
    """
    fixed = any(entry.name == PERIOD for entry in program.entries)
    for axis in axes:
        if not hasattr(program.period, axis.name):
            raise ConfigError(f"--vary {axis.name}: an artifact has no default of it; leave it out")
        if fixed and axis.name in _COMPILED:
            raise ConfigError(
                f"--vary {axis.name}: the artifact has the graph of a whole period, which was "
                f"compiled for period {program.period.period} and width "
                f"{program.period.tree_width}; compile it with --graphs entries to tune them"
            )
    own = program.period
    periods = sorted({max(_SHORTEST, own.period // 2), own.period, min(_LONGEST, 2 * own.period)})
    values: dict[str, Sequence[Value]] = {
        "threshold": THRESHOLDS,
        "period": () if fixed else periods,
        "confidence": (0.0, own.confidence or CONFIDENCE),
        **{axis.name: axis.values for axis in axes},
    }
    values = {name: listed for name, listed in values.items() if listed}
    found = []
    for mode in (Mode.EXACT, Mode.SIRIUS):
        lacks = set(OPTIONS) - set(options_of([mode]))
        names = [name for name in values if name not in lacks]
        for combination in itertools.product(*(values[name] for name in names)):
            found.append(setting_of(mode, dict(zip(names, combination, strict=True))))
    return tuple(found)


def loss(summary: Summary, *, confident: bool = False) -> float:
    """Points of accuracy lost to mode full, paired by problem: the point estimate. confident: the
    largest loss within the 95% interval instead.
    """
    difference = summary.difference
    assert difference is not None, "mode full was not run"
    return -100.0 * (difference.low if confident else difference.mean)


def allowed(
    setting: Setting, summary: Summary, max_loss: float, *, confident: bool = False
) -> bool:
    """Whether a setting's loss is at most `max_loss` points. Mode exact always is: its tokens are
    the full path's, and what differs are ties within rounding.
    """
    return setting.mode == Mode.EXACT or loss(summary, confident=confident) <= max_loss + _SLACK


def choose(
    settings: Sequence[Setting],
    summaries: Sequence[Summary],
    max_loss: float,
    *,
    confident: bool = False,
) -> Choice:
    """The fastest setting whose loss is at most `max_loss` points, of equally fast ones the first.
    If it is no faster than mode full, the fastest one of mode exact, which loses nothing.
    `settings` has one of mode exact.
    """
    pairs = list(zip(settings, summaries, strict=True))
    within = [pair for pair in pairs if allowed(*pair, max_loss, confident=confident)]
    setting, summary = max(within, key=_speed)
    if _speed((setting, summary)) > 1.0:
        return Choice(setting, summary, True)
    setting, summary = max((p for p in pairs if p[0].mode == Mode.EXACT), key=_speed)
    return Choice(setting, summary, False)


def _speed(pair: tuple[Setting, Summary]) -> float:
    """Relative to mode full; 0 where it was not measured."""
    return pair[1].speed or 0.0


def defaults(period: PeriodSpec, setting: Setting) -> PeriodSpec:
    """The artifact's defaults with this setting."""
    options: dict[str, Any] = dict(setting.options)
    return replace(period, mode=setting.mode, **options)
