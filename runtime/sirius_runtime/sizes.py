"""Numbers of nodes, cache slots and chunk tokens, shared by all back ends."""

from __future__ import annotations

import math

PREFILL_CHUNK = 512  # tokens of a prompt that one prefill call takes


def node_count(period: int, width: int) -> int:
    """Nodes of a whole tree: N = (K - 1) w + 1."""
    return (period - 1) * width + 1


def cache_slots(tokens: int, period: int, width: int) -> int:
    """Cache slots of a row of `tokens` tokens, prompt and answer, rounded up to a multiple of 64.
    They include a period's block after the last token, which is written even for rows that have
    ended.
    """
    return math.ceil((tokens + node_count(period, width)) / 64) * 64
