"""What sampling means, a distribution at a time, in Python's floats or fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def distribution(
    logits: Sequence[float], temperature: float, top_k: int, top_p: float
) -> list[float]:
    """softmax(logits / temperature) of the `top_k` likeliest (0: of all), and of these of the
    fewest whose probabilities sum to `top_p`.
    """
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    kept = ranked[:top_k] if top_k else ranked
    if top_p < 1.0:
        p = softmax(logits, kept, temperature)
        fewest = next(n for n in range(1, len(kept) + 1) if n == len(kept) or sum(p[:n]) >= top_p)
        kept = kept[:fewest]
    result = [0.0] * len(logits)
    for token, p_token in zip(kept, softmax(logits, kept, temperature), strict=True):
        result[token] = p_token
    return result


def softmax(logits: Sequence[float], tokens: Sequence[int], temperature: float) -> list[float]:
    """Probabilities of these tokens, of which the first is the likeliest."""
    weights = [math.exp((logits[token] - logits[tokens[0]]) / temperature) for token in tokens]
    return [weight / math.fsum(weights) for weight in weights]


def draw(weights: Sequence[float], u: float) -> int:
    """The first index whose weight and those before it sum to more than `u` of the whole."""
    limit, total = u * math.fsum(weights), 0.0
    for index, weight in enumerate(weights):
        total += weight
        if total > limit:
            return index
    return len(weights) - 1


def residual(p: Sequence[float], q: Sequence[float]) -> list[float]:
    """What p has more than q, not normalised."""
    return [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]


def rejections(
    p: Sequence[Fraction], children: Sequence[int]
) -> tuple[list[Fraction], list[Fraction]]:
    """Candidates that were not drawn, tried one by one: each is accepted with its probability; one
    that is refused loses it, and the rest is normalised.

    Returns the probability that each child is accepted, and that each token is emitted after all
    were refused.
    """
    accepted, left, p = [], Fraction(1), list(p)
    for child in children:
        accepted.append(left * p[child])
        left *= 1 - p[child]
        p[child] = Fraction(0)
        rest = sum(p)
        p = [value / rest if rest else value for value in p]
    return accepted, [left * value for value in p]
