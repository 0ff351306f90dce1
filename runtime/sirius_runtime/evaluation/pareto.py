"""The Pareto line of settings: those that no other beats in accuracy and in cost; and its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sirius_runtime.errors import ConfigError, shown
from sirius_runtime.new_file import NewFile
from sirius_runtime.request import Mode

if TYPE_CHECKING:
    from sirius_runtime.evaluation.ablate import Row
    from sirius_runtime.evaluation.summary import Summary

FORMATS = (".png", ".svg")
_ROOM = (0.03, 0.06)  # of a label, as shares of the plot's width and height


@dataclass(frozen=True)
class Point:
    """A setting in a plot. `gain`: the larger the better, as is `accuracy` [0, 1]."""

    gain: float
    accuracy: float


def pareto(points: Sequence[Point]) -> list[int]:
    """The indices of the points that no other point beats, by falling gain: none has at least as
    much of both and more of one. Equal points are all on the line.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i].gain, -points[i].accuracy))
    line: list[int] = []
    for index in order:
        own = points[index]
        if not line or own.accuracy > points[line[-1]].accuracy or own == points[line[-1]]:
            line.append(index)
    return line


def check_plot(path: Path) -> None:
    """Raises ConfigError where the plot could not be written: before hours of answers."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {shown(str(path))}: give a file that ends in .png or .svg")
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib: pip install 'sirius-compile[plots]', or leave --plot out"
        )


def plot(rows: Sequence[tuple[Row, Summary]], title: str, path: Path) -> None:
    """Draws accuracy over tokens/s and over effective density, with the Pareto line of each.

    A setting that stands for several rows is drawn once. Vertical bars are the 95% intervals of the
    accuracy. Points too close to another have no label; the table has them all.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = {row.setting.name: (row, summary) for row, summary in reversed(rows)}
    names = dict.fromkeys(_group(row) for row, _ in rows)
    palette = plt.get_cmap("tab10")
    colours = {name: palette(index % palette.N) for index, name in enumerate(names)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 5.4), sharey=True)
    speeds = [(row, s, s.tokens_per_second) for row, s in drawn.values()]
    reads = [(row, s, s.effective_density) for row, s in drawn.values()]
    _panel(left, [(row, s, x) for row, s, x in speeds if x is not None], 1.0, colours)
    _panel(right, reads, -1.0, colours)
    left.set_xlabel("tokens/s")
    right.set_xlabel("effective density: weight reads per token (dense: 1)")
    left.set_ylabel("accuracy, % (bars: 95% intervals)")
    for name, colour in colours.items():
        left.scatter([], [], color=[colour], s=18, label=name.replace("_", " "))
    left.legend(fontsize=7, loc="best", framealpha=0.9)
    figure.suptitle(title)
    figure.tight_layout()
    with NewFile(path) as new:
        figure.savefig(new.file, format=path.suffix.lower()[1:], dpi=120)
        new.finish()
    plt.close(figure)


def _panel(
    axis: Any,
    shown: Sequence[tuple[Row, Summary, float]],
    sign: float,
    colours: Mapping[str, Any],
) -> None:
    """Draws settings at their x; sign: 1 where more is better, else -1."""
    points = [Point(sign * x, summary.accuracy.mean) for _, summary, x in shown]
    line = pareto(points)
    at = [(x, 100 * summary.accuracy.mean) for _, summary, x in shown]
    ends = [at[index] for index in line]
    axis.plot(*zip(*ends, strict=True), color="0.6", zorder=1, label="Pareto line")
    axis.scatter(*zip(*ends, strict=True), facecolors="none", edgecolors="0.4", s=80, zorder=3)
    for (row, summary, _), (x, y) in zip(shown, at, strict=True):
        low, high, colour = summary.accuracy.low, summary.accuracy.high, colours[_group(row)]
        axis.vlines(x, 100 * low, 100 * high, color=colour, alpha=0.25, zorder=1)
        marker = "s" if row.setting.name == Mode.FULL else "o"
        axis.scatter(x, y, color=[colour], marker=marker, s=30, zorder=2)
    order = dict.fromkeys(
        [*line, *(i for i, s in enumerate(shown) if not s[0].axis), *range(len(at))]
    )
    for index in apart([at[index] for index in order]):
        number = list(order)[index]
        row = shown[number][0]
        name = f"{row.axis} {row.value}".replace("_", " ") if row.axis else row.setting.name
        axis.annotate(
            name, at[number], textcoords="offset points", xytext=(3, 5), fontsize=6, rotation=40
        )
    axis.margins(x=0.1, y=0.15)
    axis.grid(color="0.92")


def apart(places: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of places that have room for a label: none within 3% of the width and 6% of the
    height of an earlier one.
    """
    spans = [max(axis) - min(axis) or 1.0 for axis in zip(*places, strict=True)]
    found: list[int] = []
    for index, place in enumerate(places):
        near = (
            all(
                abs(a - b) < share * span
                for a, b, share, span in zip(place, other, _ROOM, spans, strict=True)
            )
            for other in (places[taken] for taken in found)
        )
        if not any(near):
            found.append(index)
    return found


def _group(row: Row) -> str:
    """The rows of one colour."""
    return row.axis or "references"
