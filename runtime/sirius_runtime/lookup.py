"""Prompt look-up: drafts copied from what a row's text says already, which read no weight.

Where the last `n` tokens stand earlier in the prompt or the answer, what followed them there is
drafted, and the full path verifies it at once: such a period has no sparse step. The sparse path
would pay for a copied token too, a step to have its K/V; and behind a wrong one its steps are lost.

The draft is no longer than the match: of short matches few go on, and every token that is verified
costs some time; of long ones nearly all do, and a copy that goes on doubles its draft each period.
(Saxena, "Prompt Lookup Decoding", 2023, drafts a fixed number.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LONGEST = 32
"""The longest n-gram."""


class Lookup:
    """One row's tokens, and where each n-gram of them went on the last time."""

    def __init__(self, length: int, tokens: Iterable[int] = ()) -> None:
        """length: n."""
        self._length = length
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # by n-gram, the place after its last one
        self.take(tokens)

    def take(self, tokens: Iterable[int]) -> None:
        """Goes on by these tokens."""
        own, n = self._tokens, self._length
        for token in tokens:
            if len(own) >= n:
                self._next[tuple(own[-n:])] = len(own)
            own.append(token)

    def continuation(self, most: int) -> Sequence[int]:
        """What followed the last n tokens where they stood before, up to `most` tokens; empty where
        they did not. A text that repeats itself goes on repeating.
        """
        own = self._tokens
        place = self._next.get(tuple(own[-self._length :]))
        if place is None:
            return ()
        match = self._length
        while match < min(most, place) and own[place - match - 1] == own[-match - 1]:
            match += 1
        found: list[int] = []
        for at in range(place, place + min(match, most)):
            found.append(own[at] if at < len(own) else found[at - len(own)])
        return found
