"""The modes that an evaluation compares: full, sparse, exact, sirius, sirius:THRESHOLD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sirius_runtime.errors import ConfigError, shown
from sirius_runtime.request import Mode

DEFAULT = "full,sparse,sirius"
_NAMES = (Mode.FULL, Mode.SPARSE, Mode.SIRIUS, Mode.EXACT)


@dataclass(frozen=True)
class ModeChoice:
    """A mode of `generate`. threshold: for mode `sirius`, None for the artifact's own."""

    mode: Mode
    threshold: float | None = None

    @property
    def name(self) -> str:
        return str(self.mode) if self.threshold is None else f"{self.mode}:{self.threshold:g}"

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `generate`."""
        return {"mode": self.mode} | (
            {} if self.threshold is None else {"threshold": self.threshold}
        )


def read_modes(text: str) -> tuple[ModeChoice, ...]:
    """Modes from a comma-separated list. Raises ConfigError for an unknown or repeated mode."""
    modes: list[ModeChoice] = []
    for item in text.split(","):
        name, colon, number = item.strip().partition(":")
        if name not in _NAMES:
            raise ConfigError(
                f"--modes takes {', '.join(_NAMES)} and sirius:THRESHOLD, got {shown(item)}"
            )
        threshold = None
        if colon:
            threshold = _threshold(name, number)
        choice = ModeChoice(Mode(name), threshold)
        if choice in modes:
            raise ConfigError(f"--modes has {choice.name} twice; leave one out")
        modes.append(choice)
    return tuple(modes)


def _threshold(name: str, number: str) -> float:
    if name != Mode.SIRIUS:
        raise ConfigError(f"mode {name} has no threshold, got {shown(f'{name}:{number}')}")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"a threshold is a number of 0 or more, got {shown(number)}")
    return value
