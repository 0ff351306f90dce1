"""Draft trees as lists of paths: what `sirius_runtime.tree` and `.policy` mean, a row at a time.

Log probabilities and scores are Python's floats; nothing here knows of masks or of rows beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.support.naive import ancestors

Path = tuple[int, ...]
Model = Callable[[Path], list[float]]
"""The logits after a path of tokens, the root first."""


def log_probability(logits: Sequence[float], token: int, temperature: float) -> float:
    scaled = [value / temperature for value in logits]
    top = max(scaled)
    return scaled[token] - top - math.log(math.fsum(math.exp(value - top) for value in scaled))


def probability(logits: Sequence[float], token: int, temperature: float) -> float:
    return math.exp(log_probability(logits, token, temperature))


def argmax(logits: Sequence[float]) -> int:
    """Of equals the first."""
    return max(range(len(logits)), key=lambda token: (logits[token], -token))


# drafting


@dataclass(frozen=True)
class Beam:
    """A path of tokens from the root, the log probability of what it drafts, and the index of its
    parent among the beams of the level above.
    """

    path: Path
    score: float
    parent: int


def beam_search(
    root: int, model: Model, levels: int, width: int, temperature: float
) -> list[list[Beam]]:
    """The best `width` paths of each level, best first, from the root's own level on.

    All continuations of all beams compete: that a beam proposes no more than `width` of them
    changes nothing.
    """
    found = [[Beam((root,), 0.0, -1)]]
    for _ in range(levels):
        found.append(continuations(found[-1], model, temperature)[:width])
    return found


def continuations(beams: Sequence[Beam], model: Model, temperature: float) -> list[Beam]:
    """Every token after every beam, best first."""
    every = []
    for parent, beam in enumerate(beams):
        logits = model(beam.path)
        for token in range(len(logits)):
            gain = log_probability(logits, token, temperature)
            every.append(Beam((*beam.path, token), beam.score + gain, parent))
    return sorted(every, key=lambda beam: -beam.score)


# verification


@dataclass(frozen=True)
class NaiveTree:
    """One row's drafted nodes: each one's token, the index of its parent (-1 the root's), and the
    score of its path.
    """

    tokens: list[int]
    parents: list[int]
    scores: list[float]

    def path(self, node: int) -> list[int]:
        """The nodes from the root to `node`."""
        return ancestors(self.parents, node)[::-1]


def longest_path(tree: NaiveTree, passes: Sequence[bool], deepest: int) -> list[int]:
    """Of all paths of which every node after the root passes the longest, of equals the likeliest.

    A path has no more than `deepest` nodes after the root.
    """
    accepted = []
    for node in range(len(tree.tokens)):
        path = tree.path(node)
        if len(path) - 1 <= deepest and all(passes[below] for below in path[1:]):
            accepted.append(path)
    return max(accepted, key=lambda path: (len(path), tree.scores[path[-1]]))


@dataclass(frozen=True)
class Committed:
    """The tokens that a period commits, and the nodes of the kept path, root first."""

    tokens: list[int]
    nodes: list[int]


def judge(
    tree: NaiveTree,
    logits: Sequence[Sequence[float]],
    passes: Callable[[int, Sequence[float]], bool],
    deepest: int,
) -> Committed:
    """The kept path's tokens, and the full path's choice after the last node of that path.

    `passes`: whether a token is kept, given the logits after its parent; `logits` are those after
    each node.
    """
    kept = [
        parent < 0 or passes(token, logits[parent])
        for token, parent in zip(tree.tokens, tree.parents, strict=True)
    ]
    nodes = longest_path(tree, kept, deepest)
    drafted = [tree.tokens[node] for node in nodes[1:]]
    return Committed([*drafted, argmax(logits[nodes[-1]])], nodes)
