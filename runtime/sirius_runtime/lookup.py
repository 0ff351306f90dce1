"""Prompt look-up: drafts that are copied from earlier text of the row, without a sparse step.

If the last `n` tokens (an n-gram) occurred before in the prompt or the answer, the tokens that
followed them there become the draft, and the full path verifies it. The sparse path does not extend
such a draft: it would first need a step for each copied token, to compute its K/V, and its steps
after a wrong copied token would be lost.

The draft is at most as long as the match. Short matches rarely continue, and each verified token
costs time. Long matches nearly always continue, and the draft of a continuing copy doubles each
period. (Saxena, "Prompt Lookup Decoding", 2023, drafts a fixed number of tokens.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LONGEST = 32
"""The longest n-gram."""


class Lookup:
    """One row's tokens, and the place after the last occurrence of each n-gram."""

    def __init__(self, length: int, tokens: Iterable[int] = ()) -> None:
        """length: n."""
        self._length = length
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram: index of the token after it
        self.take(tokens)

    def take(self, tokens: Iterable[int]) -> None:
        """Appends tokens to the row."""
        own, n = self._tokens, self._length
        for token in tokens:
            if len(own) >= n:
                self._next[tuple(own[-n:])] = len(own)
            own.append(token)

    def continuation(self, most: int) -> Sequence[int]:
        """The tokens that followed the last earlier occurrence of the last n tokens; empty if there
        is none. At most `most` tokens, and no more than match before that place. Where the copy
        reaches the end of the text, it goes on with its own tokens.
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
