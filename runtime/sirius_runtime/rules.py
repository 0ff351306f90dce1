"""The rules by which periods draft and accept: each is a function and a line in `RULES`.

The line defines a mode of that name: on every back end that runs the entries, in the graph `period`
of models that are compiled afterwards, and in the command lines. A rule's numeric options are
fields of `RuleOptions`, from which the manifest, plans, requests, graphs and `sirius run` take
them. The functions get numbers, or tensors while the graph is traced; they do no host reads.
PyTorch is imported when the functions are first called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from sirius_runtime.errors import ConfigError
from sirius_runtime.sampling import LEAST_TEMPERATURE, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from sirius_runtime.policy import Decision, Draft
    from sirius_runtime.tree import Level, Tree

Range = tuple[Callable[[float], bool], str]


def _number(default: float, metavar: str, about: str, ranges: Sequence[Range]) -> Any:
    return field(default=default, metadata={"metavar": metavar, "about": about, "ranges": ranges})


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """The numeric options of all rules, with their defaults."""

    threshold: float = _number(
        0.1,
        "R",
        "probability that a drafted token needs to be accepted",
        (
            (lambda v: v >= 0.0, "must be >= 0"),
            (lambda v: v < float("inf"), "must be finite (1.1 already accepts no draft)"),
        ),
    )
    verify_temperature: float = _number(
        0.6,
        "T",
        "softmax temperature of that probability, and of draft scores",
        (
            (lambda v: 0.0 < v < float("inf"), "must be > 0"),
            (lambda v: v >= LEAST_TEMPERATURE, f"must be >= {LEAST_TEMPERATURE}"),
        ),
    )


class RuleNumbers(TypedDict, total=False):
    """`RuleOptions` as arguments of `generate`; None: the artifact's default."""

    threshold: float | None
    verify_temperature: float | None


OPTIONS = tuple(option.name for option in fields(RuleOptions))


def values(options: RuleOptions) -> dict[str, Any]:
    """The options by name."""
    return {name: getattr(options, name) for name in OPTIONS}


def check_options(options: RuleOptions, *, flags: bool = False) -> None:
    """Raises ConfigError for numbers out of range. `flags`: name them as command-line options.
    Tensors are not checked: they are inputs of a graph, whose values are not known yet.
    """
    for option in fields(RuleOptions):
        value = getattr(options, option.name)
        if not isinstance(value, Real):
            continue
        for allowed, text in option.metadata["ranges"]:
            if not allowed(float(value)):
                name = f"--{option.name.replace('_', '-')}" if flags else option.name
                raise ConfigError(f"{name} {text}, got {value}")


class Noise(NamedTuple):
    """A period's uniform random numbers in [0, 1), float64: the only randomness of sampling.

    `draft` [B, K - 1]: one for each drafted token; `verify` [B, K]: one for each depth; `last` [B]:
    for the token that ends the period. `draft` and `verify` may be longer, so that a row uses the
    same numbers for every K.
    """

    draft: Tensor
    verify: Tensor
    last: Tensor

    @classmethod
    def unpack(cls, uniform: Tensor) -> Noise:
        """Splits a period's numbers, one tensor [B, 2, K]."""
        return cls(uniform[:, 0, 1:], uniform[:, 1], uniform[:, 0, 0])


@dataclass(frozen=True, kw_only=True)
class Asked(RuleOptions):
    """The inputs of a rule: its options; and for rules that draw, `sampling` and the uniform random
    numbers `noise` [B, 2, >= K], float64 in [0, 1).
    """

    sampling: Sampling = Sampling()  # noqa: RUF009  (frozen)
    noise: Any = None

    @property
    def numbers(self) -> Noise:
        assert self.noise is not None, "sampling needs noise"
        return Noise.unpack(self.noise)


def by_threshold(draft: Draft, logits_BNV: Tensor, asked: Asked) -> Decision:
    """Sirius' rule: a token passes if its probability by softmax(full logits / temperature) is at
    least the threshold.

    arXiv 2409.03856, section 4; the reference uses a threshold of 0.1 and a temperature of 0.6.
    A threshold of 0 accepts all drafts, and one above 1 accepts none.
    """
    from sirius_runtime.policy import Decision, after_parent, likeliest

    logits = logits_BNV.float()
    scaled = logits / asked.verify_temperature
    chosen = after_parent(scaled, draft.tree) - scaled.logsumexp(-1).gather(1, draft.tree.parents)
    choice = likeliest(logits)
    return Decision(chosen.exp() >= asked.threshold, choice, choice)


def by_argmax(draft: Draft, logits_BNV: Tensor, asked: Asked) -> Decision:
    """A token passes if it is the full path's argmax, so the output is that of dense greedy
    decoding.
    """
    from sirius_runtime.policy import Decision, is_choice, likeliest

    choice = likeliest(logits_BNV)
    return Decision(is_choice(choice, draft.tree), choice, choice)


def by_chance(draft: Draft, logits_BNV: Tensor, asked: Asked) -> Decision:
    """Lossless sampling: committed tokens have the full path's distribution p, for any draft.

    In a sampled chain, a token s drawn from the sparse path's distribution q passes with
    probability min(1, p(s) / q(s)). The correction is drawn from max(p - q, 0), renormalised
    (Leviathan et al., arXiv 2211.17192, theorem 1).

    In a tree of deterministic candidates, the children of a node would be accepted one after
    another with their probability, and each refusal would remove the child from p and renormalise.
    One draw from p has the same distribution and is what is computed: if the drawn token is a
    child, the path goes on there; if not, the token is emitted.
    """
    import torch

    from sirius_runtime.policy import Decision, draw, is_choice

    p, noise = asked.sampling.distribution(logits_BNV), asked.numbers
    if draft.distributions is None:
        choice = draw(p, noise.verify.gather(1, draft.tree.depth.clamp(min=0)))
        return Decision(is_choice(choice, draft.tree), choice, choice)
    q, last = draft.distributions, noise.last[:, None]
    drafted = draft.tree.tokens[:, 1:, None]
    p_s, q_s = p[:, :-1].gather(-1, drafted)[..., 0], q.gather(-1, drafted)[..., 0]
    root = torch.ones_like(last, dtype=torch.bool)
    passes = torch.cat([root, noise.verify[:, : q.shape[1]] * q_s < p_s], 1)
    bonuses = draw(p, last.expand(p.shape[:-1]))
    residual = (p[:, :-1] - q).clamp(min=0.0)
    corrections = draw(residual, last.expand(residual.shape[:-1]))
    return Decision(passes, torch.cat([corrections, bonuses[:, -1:]], 1), bonuses)


def best_paths(
    tree: Tree, logits_BWV: Tensor, level: Tensor, width: int, asked: Asked
) -> tuple[Level, Tensor | None]:
    """The `width` best paths, scored at verify_temperature; for width 1, the likeliest token."""
    from sirius_runtime.tree import propose

    return propose(tree, logits_BWV, level, width, asked.verify_temperature), None


def drawn_chain(
    tree: Tree, logits_BWV: Tensor, level: Tensor, width: int, asked: Asked
) -> tuple[Level, Tensor | None]:
    """The next token of a chain, drawn from the sparse path's distribution."""
    import torch

    from sirius_runtime.policy import draw
    from sirius_runtime.tree import Level, beams

    assert width == 1, "a tree's candidates are not drawn"
    q = asked.sampling.distribution(logits_BWV[:, 0])
    # Where the sparse path's logits are NaN, token 0 is drafted: any distribution is allowed.
    sure = (torch.arange(q.shape[-1], device=q.device) == 0).to(q.dtype)
    q = torch.where(q == q, q, sure)
    token = draw(q, asked.numbers.draft.index_select(1, level[None] - 1)[:, 0])[:, None]
    log_p = (logits_BWV[:, 0].float() / asked.verify_temperature).log_softmax(-1)
    above = beams(level - 1, 1, 1)
    score = tree.scores.index_select(1, above) + log_p.gather(1, token)
    return Level(token, above.expand(token.shape), score), q


@dataclass(frozen=True)
class Rule:
    """A rule of drafting and acceptance.

    accept: decides which drafted tokens pass and which token is emitted after each node, from the
    full path's logits [B, N, V] after each node. draft: returns the nodes of a chain's `level`
    (int64 [], from 1), from the sparse logits [B, 1, V] of the level above, and the distribution
    [B, V] that they were drawn from. (Trees are always drafted by `best_paths`.) draws: whether
    both use random numbers. options: names of the fields of `RuleOptions` that the rule uses.
    """

    accept: Callable[[Draft, Tensor, Asked], Decision]
    draft: Callable[[Tree, Tensor, Tensor, int, Asked], tuple[Level, Tensor | None]] = best_paths
    draws: bool = False
    options: tuple[str, ...] = ()


RULES: dict[str, Rule] = {
    "sirius": Rule(by_threshold, options=("threshold", "verify_temperature")),
    "exact": Rule(by_argmax),
    "sample": Rule(by_chance, drawn_chain, draws=True),
}
"""The rules by the name of their mode. The index in this order is a graph's input `rule`."""


def default_modes() -> tuple[str, ...]:
    """The modes that an artifact may have as its default: the rules that draw nothing."""
    return tuple(name for name, rule in RULES.items() if not rule.draws)


def options_of(rules: Sequence[str]) -> tuple[str, ...]:
    """The options that a graph of these rules has as inputs; verify_temperature is always one,
    because drafts are scored by it.
    """
    asked = {
        "verify_temperature",
        *(n for name in rules if name in RULES for n in RULES[name].options),
    }
    return tuple(name for name in OPTIONS if name in asked)
