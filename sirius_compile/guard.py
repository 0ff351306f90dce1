"""Compares a compilation's graphs with those that an earlier compilation dumped."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from sirius_runtime.errors import ConfigError, GraphMismatchError

_SHOWN_LINES = 60


def read_graphs(folder: Path) -> dict[str, str]:
    """The graphs that `--dump-graphs` wrote into `folder`, by file name.

    Raises ConfigError if there are none, or if they can't be read.
    """
    try:
        graphs = {path.name: path.read_text("utf-8") for path in sorted(folder.glob("*.txt"))}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the graphs of --expect-graphs {folder} can't be read ({error}); write them again "
            f"with --dump-graphs {folder}"
        ) from error
    if not graphs:
        raise ConfigError(
            f"--expect-graphs {folder} holds no graphs; write them once with --dump-graphs {folder}"
        )
    return graphs


def compare_graphs(expected: Path, old: Mapping[str, str], actual: Path) -> None:
    """Compares the graphs `old` of the folder `expected` with those in the folder `actual`.

    Raises GraphMismatchError with a unified diff of the first graph that differs, and the names of
    the others.
    """
    new = read_graphs(actual)
    if old == new:
        return
    differing = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
    # A diff of a graph in both folders is more useful than one of a missing or new graph.
    first = next((n for n in differing if n in old and n in new), differing[0])
    diff = list(
        difflib.unified_diff(
            old.get(first, "").splitlines(),
            new.get(first, "").splitlines(),
            f"expected/{first}",
            f"compiled/{first}",
            lineterm="",
        )
    )
    shown = "\n".join(diff[:_SHOWN_LINES])
    if len(diff) > _SHOWN_LINES:
        shown += f"\n… {len(diff) - _SHOWN_LINES} more lines"
    raise GraphMismatchError(
        f"{len(differing)} of {len(old.keys() | new.keys())} graphs differ from those in "
        f"{expected}: {', '.join(differing)}\n{shown}\n"
        f"If the change is intended, write the new graphs with --dump-graphs {expected}"
    )
