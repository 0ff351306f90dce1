"""What two back ends count alike."""

from __future__ import annotations

from typing import Any

BEYOND_AN_END = {"advances", "corrections", "effective_density", "acceptance_rate"}
"""A chain that is drafted by the entries stops at a token that ends the answer, and one that is
drafted by a graph or from a recording does not: these counts differ in an answer's last period.
"""


def counted_alike(names: str, ends: Any) -> list[str]:
    """The `names` of statistics that agree; `ends`: the tokens that end an answer, if there are."""
    return [name for name in names.split() if not (ends and name in BEYOND_AN_END)]
