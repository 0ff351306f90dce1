"""The settings that an evaluation compares: a mode of `generate` with options, as one text.

``full``, ``sparse``, ``exact``, ``sirius``, ``sirius:THRESHOLD``, and any of the last three with
options: ``exact:period=8``, ``sirius:0.05:period=8:confidence=0.3``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from sirius_runtime.errors import ConfigError, shown
from sirius_runtime.request import Mode, Options, check_ranges, check_tree, modes
from sirius_runtime.rules import (
    OPTIONS,
    RULES,
    RuleNumbers,
    RuleOptions,
    check_options,
    default_modes,
    options_of,
)

if TYPE_CHECKING:
    from sirius_runtime.model import SiriusModel

Value = int | float | str

NUMBERS: Mapping[str, type[int] | type[float]] = {
    **dict.fromkeys(OPTIONS, float),
    "period": int,
    "tree_width": int,
    "confidence": float,
    "refresh": int,
    "lookup": int,
}
"""The options of `generate` that a setting may have, and their types."""

RESEARCH: Mapping[str, tuple[str, ...]] = {
    "kv_rewriting": ("on", "off"),
    "rollback": ("minimal", "period", "token"),
}
"""Options of `sirius ablate` alone, and their values; the first is what the runtime does. See
`sirius_runtime.evaluation.ablation`.
"""

_NAMES = (Mode.FULL, Mode.SPARSE, *default_modes())


@dataclass(frozen=True)
class Setting:
    """A mode of `generate` and some of its options, in the order of `NUMBERS`; the others have the
    artifact's defaults. `options` may also have some of `RESEARCH`.
    """

    mode: str
    options: tuple[tuple[str, Value], ...] = ()

    @property
    def name(self) -> str:
        """The setting as text, which `read_modes` reads."""
        return ":".join(
            [
                self.mode,
                *(
                    text(value) if name == "threshold" else f"{name}={text(value)}"
                    for name, value in self.options
                ),
            ]
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `generate`."""
        found: dict[str, Any] = {"mode": self.mode}
        found |= {name: value for name, value in self.options if name not in RESEARCH}
        # A period of two tokens drafts one and verifies it.
        return found | ({"period": 2} if ("rollback", "token") in self.options else {})

    @property
    def research(self) -> dict[str, str]:
        """The options that `generate` does not have, without those that it behaves by anyway."""
        return {
            name: str(value)
            for name, value in self.options
            if name in RESEARCH and value not in (RESEARCH[name][0], "token")
        }

    def check(self, model: SiriusModel) -> None:
        """Raises ConfigError for an option that is out of range, or that the model lacks."""
        given = self.arguments
        rule = cast(RuleNumbers, {name: given.pop(name) for name in OPTIONS if name in given})
        model.request(Options(rule=rule, **given), [1], 1)

    def on(self, model: SiriusModel) -> SiriusModel:
        """The model that runs this setting: `model` itself, unless there are research options."""
        if not self.research:
            return model
        from sirius_runtime.evaluation.ablation import ablated

        return ablated(model, self.research)


def text(value: Value) -> str:
    """A value as in a setting's name: as short as can be without loss."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else f"{value}"


def default_settings(mode: str) -> tuple[Setting, ...]:
    """The settings of an evaluation that names none; `mode`: the artifact's own."""
    return tuple(Setting(name) for name in (Mode.FULL, Mode.SPARSE, mode))


def read_modes(given: str) -> tuple[Setting, ...]:
    """Settings from a comma-separated list. Raises ConfigError for an unknown or repeated one."""
    found: list[Setting] = []
    for item in given.split(","):
        mode, *parts = item.strip().split(":")
        if mode not in _NAMES:
            raise ConfigError(
                f"--modes takes {', '.join(_NAMES)}, sirius:THRESHOLD, and with options "
                f"exact:period=8:confidence=0.3; got {shown(item)}"
            )
        with naming(f"--modes {shown(item)}"):
            setting = setting_of(mode, dict(map(_option, parts)))
        if len(setting.options) != len(parts):
            raise ConfigError(f"--modes {shown(item)} gives an option twice; leave one out")
        if setting in found:
            raise ConfigError(f"--modes has {setting.name} twice; leave one out")
        found.append(setting)
    return tuple(found)


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Puts `what`, such as the option of a command line, before the messages of ConfigErrors."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


def _option(part: str) -> tuple[str, Value]:
    name, equals, value = part.partition("=")
    if not equals:
        name, value = "threshold", part
    if name not in NUMBERS:
        raise ConfigError(f"a setting has {', '.join(NUMBERS)}, got {shown(part)}")
    return name, read_value(name, value)


def setting_of(mode: str, options: Mapping[str, Value]) -> Setting:
    """A setting with these options. Raises ConfigError for options that have no effect in this
    mode, or are out of range.
    """
    if mode not in modes():
        raise ConfigError(f"mode must be one of {', '.join(modes())}, got {shown(mode)}")
    for name in options:
        if mode not in RULES:
            raise ConfigError(f"mode {mode} drafts nothing, so {name} has no effect in it")
        if name in OPTIONS and name not in options_of([mode]):
            raise ConfigError(f"mode {mode} has no {name}: give it to mode sirius, or leave it out")
    _check_ranges(options)
    order = [*NUMBERS, *RESEARCH]
    return Setting(str(mode), tuple(sorted(options.items(), key=lambda item: order.index(item[0]))))


def _check_ranges(options: Mapping[str, Any]) -> None:
    """The checks that need no model; `Setting.check` makes the others."""
    check_options(RuleOptions(**{name: options[name] for name in OPTIONS if name in options}))
    check_ranges(options.get("confidence", 0.0), options.get("refresh", 0))
    width = options.get("tree_width", 1)
    check_tree(options.get("period", 1), width, max(width, 1))


def read_value(name: str, given: str) -> Value:
    """An option's value from its text. Raises ConfigError for text that is none."""
    given = given.strip()
    if name in RESEARCH:
        if given not in RESEARCH[name]:
            raise ConfigError(f"{name} takes {' or '.join(RESEARCH[name])}, got {shown(given)}")
        return given
    kind = NUMBERS[name]
    try:
        return kind(given)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{name} takes {what}, got {shown(given)}") from None
