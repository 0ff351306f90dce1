"""Guards a model's graphs: compares those of a compilation with those that an earlier one
dumped.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from sirius_runtime.errors import ConfigError, GraphMismatchError

_SHOWN_LINES = 60


def expect_graphs(expected: Path, actual: Path) -> int:
    """Compares two folders that `--dump-graphs` wrote; returns the number of graphs compared.

    Raises GraphMismatchError with a unified diff of the first graph that differs, and the names of
    the others; ConfigError where `expected` holds no dumped graphs.
    """
    old, new = _graphs(expected), _graphs(actual)
    if not old:
        raise ConfigError(
            f"--expect-graphs {expected} holds no graphs; write them once with "
            f"--dump-graphs {expected}"
        )
    if old == new:
        return len(old)
    differing = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
    # A graph that is in both folders says more than one that is missing or new.
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
        f"{len(differing)} of {len(old.keys() | new.keys())} graphs are not as {expected} has "
        f"them: {', '.join(differing)}\n{shown}\n"
        f"If the change is wanted, write the new graphs with --dump-graphs {expected}"
    )


def _graphs(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*.txt"))}
