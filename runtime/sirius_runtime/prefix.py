"""A prompt's K/V, kept for other prompts that begin with its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sirius_runtime.errors import GenerationError


@dataclass(frozen=True)
class Prefix:
    """The full path's K/V of P `tokens`, and their statistic of griffin's neurons.

    k, v: [layers, 1, G, P, D]; statistic: [layers, 1, I]; in arrays of the back end that made them.
    passes: forward passes that ran. The tensors equal those of a whole prompt up to rounding: with
    a prefix, a prompt runs in different chunks, and the rounding of a matrix product depends on its
    number of tokens. So the generated tokens are the same, unless two logits or two neurons tie
    within that rounding.
    """

    tokens: tuple[int, ...]
    k: Any
    v: Any
    statistic: Any
    passes: int

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises GenerationError for a prompt that does not begin with the prefix, or is equal to
        it.
        """
        size = len(self.tokens)
        for index, prompt in enumerate(prompts):
            if tuple(prompt[:size]) != self.tokens:
                raise GenerationError(
                    f"prompt {index} does not begin with the {size} tokens of the prefix; leave "
                    "out prefix, or make it from tokens that all prompts share (shared_prefix)"
                )
            if len(prompt) == size:
                raise GenerationError(
                    f"prompt {index} is equal to the prefix, but at least one token must be run "
                    "after it; make a shorter prefix"
                )


def shared_prefix(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest common prefix of all prompts that is shorter than each of them."""
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # share no more than all do
    size = min(map(len, prompts)) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), size)
    return first[: min(size, same)]
