"""Sampling is lossless: one period under every value that its noise can take.

Probabilities are multiples of a fraction, so that a grid of as many uniform numbers, each the
middle of its cell, stands for all: laws come out as fractions, and are compared as such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sirius_runtime.policy import Decide, Decision, Draft, Verdict, judge
from sirius_runtime.rules import Noise
from sirius_runtime.sampling import Sampling
from sirius_runtime.tree import Level
from tests.support.drafts import build
from tests.support.naive_sampling import rejections
from tests.support.rules import sampled
from tests.support.toy import Context, Loop, Toy

Law = dict[tuple[int, ...], Fraction]
"""The probability of each sequence of tokens."""


def shares(of: int, among: int) -> list[tuple[int, ...]]:
    """Every way to share `of` parts `among` tokens."""
    return [parts for parts in product(range(of + 1), repeat=among) if sum(parts) == of]


def grid(*cells: int) -> list[Tensor]:
    """Every combination of the middles of so many cells of [0, 1)."""
    axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in cells]
    return [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]


def law_of(verdict: Verdict) -> Law:
    """Of what is committed, each row as likely as any other."""
    rows = zip(verdict.tokens.tolist(), verdict.advance.tolist(), strict=True)
    counts = Counter(tuple(tokens[:advance]) for tokens, advance in rows)
    return {tokens: Fraction(n, len(verdict.advance)) for tokens, n in counts.items()}


# a period and what follows it

WORDS, PARTS, SIZE = 3, 4, 3
CELLS = 12  # p / q and what is left of p are multiples of 1/2, 1/3 or 1/4
Table = list[tuple[int, ...]]
"""Quarters of the probability of each next token, by the last token."""

tables = st.lists(st.sampled_from(shares(PARTS, WORDS)), min_size=WORDS, max_size=WORDS)


def logits_of(table: Table) -> Tensor:
    by_last = torch.tensor(table, dtype=torch.float32).log()
    return by_last.expand(WORDS, WORDS, WORDS)


def continued(law: Law, p: Table, count: int) -> Law:
    """The law of the first `count` tokens after token 0 where p goes on after what is committed."""
    result: Law = dict.fromkeys(product(range(WORDS), repeat=count), Fraction(0))
    for tokens, share in law.items():
        for more in product(range(WORDS), repeat=count - len(tokens)):
            path = (*tokens, *more)
            follow = Fraction(1)
            for i in range(len(tokens), count):
                follow *= Fraction(p[path[i - 1]][path[i]], PARTS)
            result[path] += share * follow
    return result


def one_period(loop: Loop, toy: Toy, most: int) -> Law:
    """The law of what a period commits after token 0."""
    first, second, *verify = grid(PARTS, PARTS, CELLS, CELLS, CELLS)
    # A chain reads the last of them as the one for its end, a tree as the one for depth 2.
    noise = Noise(torch.stack([first, second], 1), torch.stack(verify, 1), verify[2])
    root = torch.zeros(len(first), dtype=torch.int64)
    most_B = torch.full_like(root, most)
    return law_of(loop.period(toy, Context(root, root), noise, most_B))


def own_law(p: Table) -> Law:
    """Of the full model's first three tokens."""
    start: Law = {(a,): Fraction(p[0][a], PARTS) for a in range(WORDS)}
    return continued(start, p, SIZE)


@given(tables, tables, st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.integers(1, SIZE))
def test_a_drawn_chain_is_lossless(p: Table, q: Table, confidence: float, most: int) -> None:
    loop = replace(Loop.drawn_chain(SIZE, Sampling()), confidence=confidence)
    committed = one_period(loop, Toy(logits_of(p), logits_of(q)), most)
    assert continued(committed, p, SIZE) == own_law(p)


@given(
    tables,
    st.integers(0, 2**32),
    st.integers(1, WORDS),
    st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    st.integers(1, SIZE),
)
def test_a_tree_is_lossless(p: Table, seed: int, width: int, confidence: float, most: int) -> None:
    sparse = torch.randn(WORDS, WORDS, WORDS, generator=torch.Generator().manual_seed(seed))
    loop = replace(Loop.tree(SIZE, width, Sampling()), confidence=confidence)
    committed = one_period(loop, Toy(logits_of(p), sparse), most)
    assert continued(committed, p, SIZE) == own_law(p)


def test_a_drawn_chain_that_corrects_from_p_is_not() -> None:
    """So that the laws above do tell right from wrong."""

    def corrects_from_p(noise: Noise) -> Decide:
        def decide(draft: Draft, logits_BNV: Tensor) -> Decision:
            decision = sampled(Sampling(), noise)(draft, logits_BNV)
            return decision._replace(corrections=decision.bonuses)

        return decide

    p, q = [(2, 1, 1)] * WORDS, [(1, 1, 2)] * WORDS
    right = Loop.drawn_chain(SIZE, Sampling())
    wrong = replace(right, decide=corrects_from_p)
    toy = Toy(logits_of(p), logits_of(q))
    assert continued(one_period(right, toy, SIZE), p, SIZE) == own_law(p)
    assert continued(one_period(wrong, toy, SIZE), p, SIZE) != own_law(p)


# candidates, tried one by one

CANDIDATE_WORDS, TWELFTHS = 4, 12
steps = st.tuples(st.integers(0, 1), st.integers(0, CANDIDATE_WORDS - 1))  # a parent and a token


def naive_law(
    p: Sequence[Sequence[Fraction]], parents: Sequence[int], tokens: Sequence[int]
) -> Law:
    """Of what is committed where each node's children are tried in order."""
    law: Law = {}

    def visit(node: int, share: Fraction, path: tuple[int, ...]) -> None:
        children = [child for child, parent in enumerate(parents) if parent == node]
        accepted, emitted = rejections(p[node], [tokens[child] for child in children])
        for child, chance in zip(children, accepted, strict=True):
            visit(child, share * chance, (*path, tokens[child]))
        for token, chance in enumerate(emitted):
            if share * chance:
                law[*path, token] = share * chance

    visit(0, Fraction(1), ())
    return law


@given(
    st.lists(st.sampled_from(shares(TWELFTHS, CANDIDATE_WORDS)), min_size=5, max_size=5),
    st.permutations(range(CANDIDATE_WORDS)),
    st.lists(steps, min_size=2, max_size=2, unique=True),
)
def test_candidates_pass_as_if_tried_one_by_one(
    parts: list[tuple[int, ...]], first: list[int], second: list[tuple[int, int]]
) -> None:
    """Refusing one takes it from p, and normalises what is left."""
    parents = [-1, 0, 0, *(1 + parent for parent, _ in second)]
    tokens = [0, *first[:2], *(token for _, token in second)]
    verify = torch.stack(grid(TWELFTHS, TWELFTHS, TWELFTHS), 1)
    B = len(verify)

    def level(nodes: slice) -> Level:
        every = torch.tensor([tokens[nodes], parents[nodes]])[:, None].expand(-1, B, -1)
        return Level(every[0], every[1], torch.tensor([-1.0, -2.0]).expand(B, -1))

    tree = build(torch.zeros(B, dtype=torch.int64), [level(slice(1, 3)), level(slice(3, 5))], 3, 2)
    draft = Draft(tree, torch.full((B,), 2), None)
    noise = Noise(torch.zeros(B, 2), verify, torch.zeros(B))
    logits = torch.tensor(parts, dtype=torch.float32).log().expand(B, -1, -1)
    verdict = judge(draft, logits, sampled(Sampling(), noise), torch.full((B,), 3), 3)
    p = [[Fraction(part, TWELFTHS) for part in row] for row in parts]
    assert law_of(verdict) == naive_law(p, parents, tokens)
