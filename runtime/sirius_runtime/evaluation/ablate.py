"""The settings of an ablation: one option at a time is varied around the artifact's defaults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sirius_runtime.errors import ConfigError, shown
from sirius_runtime.evaluation.modes import (
    NUMBERS,
    RESEARCH,
    Setting,
    Value,
    naming,
    read_value,
    setting_of,
    text,
)
from sirius_runtime.request import Mode
from sirius_runtime.rules import OPTIONS, options_of
from sirius_runtime.spec import ProgramSpec


@dataclass(frozen=True)
class Axis:
    """An option, and the values that it is given."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Row:
    """A row of the table: a reference (`axis` is empty), or one value of an axis. `default`:
    whether it is what the artifact does anyway; such rows share one setting.
    """

    axis: str
    value: str
    setting: Setting
    default: bool = False


DEFAULT_AXES = (
    Axis("threshold", (0.01, 0.05, 0.1, 0.3, 0.5)),
    Axis("verify_temperature", (0.3, 0.6, 1.0)),
    Axis("period", (4, 8, 16)),
    Axis("tree_width", (1, 2, 4)),
    Axis("confidence", (0.0, 0.3, 0.6)),
    Axis("refresh", (0, 4, 16)),
    Axis("kv_rewriting", RESEARCH["kv_rewriting"]),
    Axis("rollback", RESEARCH["rollback"]),
)
"""What is varied if nothing is named, as far as the artifact and the mode have it."""


def read_axes(given: Sequence[str], *, research: bool = True) -> list[Axis]:
    """Axes from texts ``NAME=VALUE,VALUE,…``. research: whether options of `RESEARCH` are allowed.
    Raises ConfigError for an unknown or repeated name, and for a value that is repeated or out of
    range.
    """
    known = [*NUMBERS, *(RESEARCH if research else ())]
    axes: list[Axis] = []
    for item in given:
        name, equals, listed = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise ConfigError(
                f"--vary takes NAME=VALUE,VALUE,… with a name of {', '.join(known)}; got "
                f"{shown(item)}"
            )
        if any(axis.name == name for axis in axes):
            raise ConfigError(f"--vary has {name} twice; list its values in one")
        values: list[Value] = []
        for part in listed.split(","):
            with naming("--vary"):
                value = read_value(name, part)
                setting_of(Mode.SIRIUS, {name: value})  # raises for a value out of range
            if value in values:
                raise ConfigError(f"--vary {name} has the value {text(value)} twice; leave one out")
            values.append(value)
        axes.append(Axis(name, tuple(values)))
    return axes


def default_value(program: ProgramSpec, name: str) -> Value:
    """What an option is where none is given."""
    if name in RESEARCH:
        return RESEARCH[name][0]
    return 0 if name == "lookup" else getattr(program.period, name)  # evaluations do not look up


def rows(program: ProgramSpec, axes: Sequence[Axis], mode: str | None = None) -> list[Row]:
    """The references `full` and `exact`, the defaults, and each value of each axis. No axes: the
    default ones. mode: by default the artifact's.

    Raises ConfigError for an option that has no effect in this mode.
    """
    mode = program.period.mode if mode is None else mode
    base = setting_of(mode, {})
    references = dict.fromkeys([Setting(str(Mode.FULL)), Setting(str(Mode.EXACT)), base])
    found = [Row("", setting.name, setting, setting == base) for setting in references]
    for axis in axes or _possible(program, mode):
        usual = default_value(program, axis.name)
        for value in axis.values:
            own = setting_of(mode, {axis.name: value})  # raises also for the default
            setting = base if value == usual else own
            found.append(Row(axis.name, text(value), setting, value == usual))
    return found


def settings(rows: Sequence[Row]) -> tuple[Setting, ...]:
    """The settings of the rows, each once."""
    return tuple(dict.fromkeys(row.setting for row in rows))


def _possible(program: ProgramSpec, mode: str) -> Iterator[Axis]:
    for axis in DEFAULT_AXES:
        lacks = axis.name == "refresh" and not program.sparsity.method.per_prompt
        lacks |= axis.name in OPTIONS and axis.name not in options_of([mode])
        if not lacks:
            yield axis
