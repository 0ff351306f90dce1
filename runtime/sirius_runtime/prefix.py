"""What a prompt leaves behind, kept to begin other prompts with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sirius_runtime.errors import GenerationError


@dataclass(frozen=True)
class Prefix:
    """The full path's K/V of `tokens` (P of them), and what they say of griffin's neurons.

    k, v: [layers, 1, G, P, D], statistic: [layers, 1, I], in the arrays of the back end that made
    them. They equal the numbers of a prompt that is run whole, but for the rounding of sums: after
    a prefix a prompt runs in other chunks, and the rounding of a matrix product depends on its
    number of tokens. So tokens are the same, unless two logits or two neurons tie within that
    rounding.
    """

    tokens: tuple[int, ...]
    k: Any
    v: Any
    statistic: Any
    passes: int

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises GenerationError for a prompt that does not begin with it, or ends with it."""
        size = len(self.tokens)
        for index, prompt in enumerate(prompts):
            if tuple(prompt[:size]) != self.tokens:
                raise GenerationError(
                    f"prompt {index} does not begin with the {size} tokens of the prefix; leave "
                    "out prefix, or make one of what the prompts share (shared_prefix)"
                )
            if len(prompt) == size:
                raise GenerationError(
                    f"prompt {index} is the prefix itself: it needs a token more, whose logits "
                    "the answer begins with; make a shorter prefix"
                )


def shared_prefix(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest beginning that all prompts share, and that none of them ends with."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # the most different ones
    size = min(map(len, prompts)) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), size)
    return first[: min(size, same)]
