"""How many nodes, slots and tokens there are: arithmetic that every back end shares."""

from __future__ import annotations

import math

PREFILL_CHUNK = 512  # tokens of a prompt that one prefill call takes


def node_count(period: int, width: int) -> int:
    """Nodes of a whole tree: N = (K - 1) w + 1."""
    return (period - 1) * width + 1


def cache_slots(tokens: int, period: int, width: int) -> int:
    """Cache slots for rows of `tokens`, prompt and answer: the block of a period follows the last
    committed token, also that of a row that has ended.
    """
    return math.ceil((tokens + node_count(period, width)) / 64) * 64
