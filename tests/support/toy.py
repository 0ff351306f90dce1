"""Two models that are tables, and periods over thousands of rows of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sirius_runtime.drafting import Propose, begin, extend
from sirius_runtime.policy import Decide, Draft, Verdict, judge
from sirius_runtime.rules import Noise
from sirius_runtime.sampling import Sampling
from sirius_runtime.tree import Tree, beams
from tests.support.rules import best, drawn, sampled

TEMPERATURE = 0.6  # of the scores of a draft


@dataclass(frozen=True)
class Toy:
    """Logits [V, V, V] of the next token by the last two, of the full and of the sparse path."""

    full: Tensor
    sparse: Tensor

    @classmethod
    def random(cls, vocabulary: int, seed: int) -> Toy:
        """Paths that often agree, and often do not."""
        generator = torch.Generator().manual_seed(seed)
        full, error = torch.randn(2, vocabulary, vocabulary, vocabulary, generator=generator)
        return cls(1.5 * full, 1.5 * full + error)


@dataclass(frozen=True)
class Context:
    """The root of each row [B], and the token before it."""

    before: Tensor
    root: Tensor

    def after(self, table: Tensor, tree: Tree, nodes: Tensor) -> Tensor:
        """Logits [B, W, V] after these nodes [W]."""
        parents = tree.tokens.gather(1, tree.parents)[:, nodes]
        before = torch.where(nodes > 0, parents, self.before[:, None])
        return table[before, tree.tokens[:, nodes]]

    def advanced(self, verdict: Verdict) -> Context:
        past = torch.cat([self.root[:, None], verdict.tokens], 1)
        before = past.gather(1, verdict.advance[:, None] - 1)[:, 0]
        return Context(before, verdict.root)


@dataclass(frozen=True)
class Loop:
    """How periods run: as `sirius_runtime.plan.Plan`, but for noise that is new each time.

    `revise`: what is done to a draft before it is judged, for tests that do wrong on purpose.
    """

    size: int
    width: int
    propose: Callable[[Noise], Propose]
    decide: Callable[[Noise], Decide]
    draws: bool
    confidence: float = 0.0
    revise: Callable[[Draft], Draft] = lambda draft: draft

    @classmethod
    def drawn_chain(cls, size: int, sampling: Sampling) -> Loop:
        return cls(
            size,
            1,
            lambda noise: drawn(sampling, noise, TEMPERATURE),
            lambda noise: sampled(sampling, noise),
            draws=True,
        )

    @classmethod
    def tree(cls, size: int, width: int, sampling: Sampling) -> Loop:
        return cls(
            size,
            width,
            lambda noise: best(width, TEMPERATURE),
            lambda noise: sampled(sampling, noise),
            draws=False,
        )

    def period(self, toy: Toy, context: Context, noise: Noise, most_B: Tensor) -> Verdict:
        """Drafts by the sparse table, judges by the full one."""
        state = begin(
            context.root,
            torch.ones_like(context.root, dtype=torch.bool),
            most_B,
            period=self.size,
            width=self.width,
            sampled_from=toy.full.shape[-1] if self.draws else None,
        )
        propose, confidence = self.propose(noise), torch.tensor(self.confidence)
        for depth in range(1, self.size):
            level = torch.tensor(depth)
            above = beams(level - 1, self.width, 1 if depth == 1 else self.width)
            logits = context.after(toy.sparse, state.tree, above)
            state = extend(state, logits, level, propose, most_B, confidence)
        draft = self.revise(state.draft)
        logits = context.after(toy.full, draft.tree, torch.arange(draft.tree.tokens.shape[1]))
        return judge(draft, logits, self.decide(noise), most_B, self.size)


def generate(
    toy: Toy, loop: Loop, rows: int, count: int, *, most_B: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The first `count` tokens [rows, count] after tokens 0 and 1, and how far each of as many
    periods advanced [rows, count].
    """
    generator = torch.Generator().manual_seed(seed)
    most_B = torch.full((rows,), loop.size) if most_B is None else most_B
    context = Context(torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.int64))
    length = torch.zeros(rows, 1, dtype=torch.int64)
    tokens = torch.zeros(rows, count * loop.size, dtype=torch.int64)
    advances = []
    for _ in range(count):  # each commits a token at the least
        uniform = torch.rand(rows, 2, loop.size, generator=generator, dtype=torch.float64)
        verdict = loop.period(toy, context, Noise.unpack(uniform), most_B)
        tokens.scatter_(1, length + torch.arange(loop.size), verdict.tokens)
        length = length + verdict.advance[:, None]
        context = context.advanced(verdict)
        advances.append(verdict.advance)
    return tokens[:, :count], torch.stack(advances, 1)
