"""A trace: what each period of one answer drafted, how the full path judged it, and what was
committed.

`Generation` hands each `Period` and its evidence to a `Tracer`, which reads the tensors and makes
plain numbers of them. Without a tracer nothing is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from sirius_runtime.decoder import Evidence, Period, Way
from sirius_runtime.errors import ConfigError, GenerationError
from sirius_runtime.rules import RULES, options_of
from sirius_runtime.spec import to_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from sirius_runtime.decoder import Backend
    from sirius_runtime.kv_check import CacheCheck
    from sirius_runtime.plan import Plan
    from sirius_runtime.request import Request
    from sirius_runtime.state import State

FORMAT = 1
"""Of the records; a reader of another number may find other fields."""
_CONTEXT = 8  # tokens before one that are decoded with it


class Fate(StrEnum):
    """What became of a drafted token."""

    KEPT = "kept"
    """It is part of the answer."""
    REFUSED = "refused"
    """The token before it was kept, and the full path refused this one."""
    DROPPED = "dropped"
    """It follows a refused token, or is on a path of the tree that was not taken."""


class Kind(StrEnum):
    """The kinds of findings."""

    OVER_CORRECTION = "over-correction"
    """A drafted token was refused that is the full path's own argmax: the correction is the very
    same token, and the drafted tokens behind it were lost for nothing.
    """
    UNDER_CORRECTION = "under-correction"
    """A drafted token was kept that is not the full path's argmax: dense decoding would have gone
    on with another. The first one is where the answer departs from the dense one.
    """
    CACHE_INCONSISTENCY = "cache-inconsistency"
    """Committed K/V is not that of a dense run over the same tokens."""


@dataclass(frozen=True)
class Finding:
    """Something that a trace names, at a token of the answer. `instead`: the full path's argmax
    there, with its probability; `departs`: whether the answer was the dense one up to here.
    """

    kind: Kind
    position: int
    token: int
    text: str | None
    full: float | None
    instead: Emitted
    departs: bool = False


@dataclass(frozen=True)
class Drafted:
    """A drafted token: a node of the draft tree, whose node 0 is the root.

    full: the full path's probability of it after its parent, as the mode judges it; sparse: the
    sparse path's. None for a probability that is no number, or -inf's. likeliest: whether it is the
    full path's argmax.
    """

    node: int
    parent: int
    depth: int
    token: int
    text: str | None
    full: float | None
    sparse: float | None
    likeliest: bool
    fate: Fate


@dataclass(frozen=True)
class Emitted:
    """The full path's own token, and its probability; None where that is not known."""

    token: int
    text: str | None
    full: float | None


@dataclass(frozen=True)
class Step:
    """A period, or a dense step.

    position: of its first token in the answer. period, width: K and width of the draft. draft: its
    nodes, level by level. emitted: what follows the kept tokens; corrects: whether in place of a
    refused one (a tree may hold none after its kept path). advance: tokens committed; tokens: those
    of them that the answer takes, fewer where it ends among them. reason: why a step is dense.
    looked_up: whether the draft was copied from the text so far, and not the sparse path's.
    """

    number: int
    way: Way
    position: int
    period: int
    width: int
    draft: tuple[Drafted, ...]
    emitted: Emitted
    corrects: bool
    advance: int
    tokens: tuple[int, ...]
    seconds: float
    reason: str | None
    findings: tuple[Finding, ...]
    looked_up: bool = False

    @property
    def kept(self) -> tuple[Drafted, ...]:
        return tuple(one for one in self.draft if one.fate is Fate.KEPT)

    def record(self) -> dict[str, Any]:
        """As a line of JSON."""
        fields = to_json(self)
        assert isinstance(fields, dict)
        kind = "period" if fields.pop("way") == Way.DRAFT else "dense"
        return {"type": kind} | fields


@dataclass(frozen=True)
class Tracing:
    """How to trace. listener: called with each step, once its tokens are committed. check_kv: in
    the end, compare the caches with those of a dense run over the same tokens.
    """

    listener: Callable[[Step], None] | None = None
    check_kv: bool = False


@dataclass(frozen=True)
class Trace:
    """The trace of one answer. first: its first token, which the prompt's prefill makes."""

    model: dict[str, Any]
    settings: dict[str, Any]
    prompt: tuple[int, ...]
    prompt_text: str | None
    first: Emitted
    steps: tuple[Step, ...]
    cache: CacheCheck | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The answer's."""
        return (self.first.token, *(token for step in self.steps for token in step.tokens))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of all steps; those of the cache are `cache.differences`."""
        return tuple(finding for step in self.steps for finding in step.findings)

    def count(self, kind: Kind) -> int:
        """How often it was found."""
        if kind is Kind.CACHE_INCONSISTENCY:
            return 0 if self.cache is None else self.cache.inconsistent
        return sum(finding.kind is kind for finding in self.findings)

    def records(self) -> Iterator[dict[str, Any]]:
        """The trace as objects of JSON: a header, the first token, a step each, the cache's check,
        and an end (docs/trace.md).
        """
        yield {
            "type": "header",
            "format": FORMAT,
            "model": self.model,
            "settings": self.settings,
            "prompt": list(self.prompt),
            "prompt_text": self.prompt_text,
        }
        yield {"type": "prefill", "emitted": to_json(self.first), "tokens": [self.first.token]}
        for step in self.steps:
            yield step.record()
        if self.cache is not None:
            yield {"type": "cache"} | self.cache.record()
        yield {
            "type": "end",
            "tokens": len(self.tokens),
            "steps": len(self.steps),
            "findings": {str(kind): self.count(kind) for kind in Kind},
        }


def check_traceable(backend: Backend, request: Request, rows: int) -> None:
    """Raises ConfigError or GenerationError for a run that can't be traced."""
    if request.mode not in RULES:
        raise ConfigError(
            f"a trace is of drafts, and mode {request.mode} makes none: use mode "
            f"{', '.join(RULES)}, or leave trace out"
        )
    if rows != 1:
        raise GenerationError(f"a trace is of one row, the batch has {rows}: trace them one by one")
    if not backend.explains:
        raise ConfigError(
            f"a trace is of backend eager, and {type(backend).__name__} does not tell why its "
            "periods do what they do: load the artifact with backend='eager', or leave trace out"
        )


class Tracer:
    """Makes the trace of a run of one row."""

    def __init__(
        self,
        tracing: Tracing,
        backend: Backend,
        request: Request,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
    ) -> None:
        self.tracing = tracing
        self._tokenizer, self._processes = tokenizer, False
        if request.scoring is not None:
            self._processes = bool(request.scoring.processing)
        self._history = list(prompt)  # and all tokens that were committed, taken or not
        self._taken, self._departed = 0, False
        self._steps: list[Step] = []
        text = None if tokenizer is None else tokenizer.decode(prompt, skip_special_tokens=False)
        nothing = Emitted(0, None, None)
        self._trace = Trace(_model(backend), _settings(request), tuple(prompt), text, nothing, ())

    @property
    def trace(self) -> Trace:
        return replace(self._trace, steps=tuple(self._steps))

    def first(self, token: int) -> None:
        """Takes the token that the prefill made."""
        emitted = Emitted(token, self._text(self._history, token), None)
        self._trace = replace(self._trace, first=emitted)
        self._history.append(token)
        self._taken = 1

    def step(
        self,
        way: Way,
        plan: Plan,
        done: Period,
        taken: Sequence[int],
        seconds: float,
        reason: str | None,
        looked_up: bool,
    ) -> None:
        """Takes what a period did; `taken`: the answer's tokens of it."""
        assert done.evidence is not None
        if way is Way.DRAFT:
            draft, emitted, corrects, findings = self._drafted(plan, done, len(taken), looked_up)
        else:
            draft, emitted, corrects, findings = (), self._stepped(plan, done), False, ()
        committed = done.rows[0].tokens
        step = Step(
            number=len(self._steps) + 1,
            way=way,
            position=self._taken,
            period=plan.period if way is Way.DRAFT else 1,
            width=plan.width if way is Way.DRAFT else 1,
            draft=draft,
            emitted=emitted,
            corrects=corrects,
            advance=len(committed),
            tokens=tuple(taken),
            seconds=seconds,
            reason=reason,
            findings=findings,
            looked_up=looked_up,
        )
        self._steps.append(step)
        self._history += committed
        self._taken += len(taken)
        if self.tracing.listener is not None:
            self.tracing.listener(step)

    def end(self, state: State, fresh: Callable[[int], State]) -> None:
        """Checks the caches, where that is asked for; `fresh` opens a state for so many tokens."""
        if not self.tracing.check_kv:
            return
        from sirius_runtime.kv_check import check_kv

        tokens = self._history[:-1]  # the last one's K/V is not computed yet
        self._trace = replace(self._trace, cache=check_kv(state, fresh(len(tokens)), tokens))

    def _stepped(self, plan: Plan, done: Period) -> Emitted:
        [token] = done.rows[0].tokens
        full = None
        if not self._processes:  # else they are not what the token was chosen by
            assert done.evidence is not None
            full = _Full(plan, done.evidence.logits[0]).of(0, token)
        return Emitted(token, self._text(self._history, token), full)

    def _drafted(
        self, plan: Plan, done: Period, taken: int, looked_up: bool
    ) -> tuple[tuple[Drafted, ...], Emitted, bool, tuple[Finding, ...]]:
        evidence, [row] = done.evidence, done.rows
        assert evidence is not None
        assert evidence.draft is not None
        assert evidence.verdict is not None
        tree = evidence.draft.tree
        tokens, parents, depths = (t[0].tolist() for t in (tree.tokens, tree.parents, tree.depth))
        path = evidence.verdict.nodes[0].tolist()[: len(row.tokens)]
        full = _Full(plan, evidence.logits[0])
        sparse = [None] * len(tokens) if looked_up else _sparse(plan, evidence)

        def after(node: int, token: int) -> Emitted:
            """A token of the full path after a node."""
            before, at = [], node
            while at:
                before.append(tokens[at])
                at = parents[at]
            text = self._text([*self._history[-_CONTEXT:], *reversed(before)], token)
            return Emitted(token, text, full.of(node, token))

        def drafted(node: int) -> Drafted:
            above, token = parents[node], tokens[node]
            seen, fate = after(above, token), Fate.DROPPED
            if node in path:
                fate = Fate.KEPT
            elif above == path[-1]:
                fate = Fate.REFUSED
            return Drafted(
                node=node,
                parent=above,
                depth=depths[node],
                token=token,
                text=seen.text,
                full=seen.full,
                sparse=sparse[node],
                likeliest=full.likeliest[above] == token,
                fate=fate,
            )

        nodes = [node for node in range(1, len(tokens)) if 1 <= depths[node] <= row.drafted]
        draft = tuple(map(drafted, nodes))
        found = []
        if not RULES[plan.rule].draws:  # else refusals and unlikely tokens keep a distribution
            for one in draft:
                kind = _kind(one)
                if kind is not None and one.depth <= taken:
                    instead = after(one.parent, full.likeliest[one.parent])
                    found.append(self._finding(kind, one, instead))
        corrects = any(one.fate is Fate.REFUSED for one in draft)
        return draft, after(path[-1], row.tokens[-1]), corrects, tuple(found)

    def _finding(self, kind: Kind, one: Drafted, instead: Emitted) -> Finding:
        departs = kind is Kind.UNDER_CORRECTION and not self._departed
        self._departed |= departs
        position = self._taken + one.depth - 1
        return Finding(kind, position, one.token, one.text, one.full, instead, departs)

    def _text(self, before: Sequence[int], token: int) -> str | None:
        """A token's text; its name where it has none of its own: a special token, or bytes of an
        unfinished character.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            return None
        context = list(before[-_CONTEXT:])
        head, whole = tokenizer.decode(context), tokenizer.decode([*context, token])
        text = whole[len(head) :] if whole.startswith(head) else tokenizer.decode([token])
        if text and "\ufffd" not in text:
            return text
        return tokenizer.id_to_token(token) or text


def _kind(one: Drafted) -> Kind | None:
    """The kind of finding that a drafted token's fate is, under a greedy rule."""
    if one.fate is Fate.KEPT and not one.likeliest:
        return Kind.UNDER_CORRECTION
    if one.fate is Fate.REFUSED and one.likeliest:
        return Kind.OVER_CORRECTION
    return None


class _Full:
    """The full path's probabilities after each node, by its logits [N, V], as the mode judges."""

    def __init__(self, plan: Plan, logits_NV: Any) -> None:
        from sirius_runtime.policy import likeliest

        self.likeliest: list[int] = likeliest(logits_NV).tolist()
        self._draws = RULES[plan.rule].draws
        if self._draws:
            self._values = plan.sampling.distribution(logits_NV)
        else:
            self._values = logits_NV.float() / plan.verify_temperature
            self._sums = self._values.logsumexp(-1).tolist()

    def of(self, node: int, token: int) -> float | None:
        """The probability of a token after a node."""
        value = float(self._values[node, token])
        return _number(value if self._draws else math.exp(min(value - self._sums[node], 0.0)))


def _sparse(plan: Plan, evidence: Evidence) -> list[float | None]:
    """The sparse path's probability of each node's token after its parent: that of which it was
    drawn, else at the verify temperature, by which drafts are scored.
    """
    assert evidence.draft is not None
    tree, q = evidence.draft.tree, evidence.draft.distributions
    if q is not None:
        drawn = q[0].gather(-1, tree.tokens[0, 1:, None])[:, 0].tolist()
        return [None, *map(_number, drawn)]
    scores, parents = tree.scores[0].double().tolist(), tree.parents[0].tolist()
    return [
        None if math.isinf(scores[parent]) else _number(math.exp(min(score - scores[parent], 0.0)))
        for score, parent in zip(scores, parents, strict=True)
    ]


def _number(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def _model(backend: Backend) -> dict[str, Any]:
    model, sparsity = backend.program.model, backend.program.sparsity
    return {
        "source": model.source,
        "revision": model.revision,
        "model_type": model.model_type,
        "parameters": model.parameters,
        "dtype": str(backend.dtype).removeprefix("torch."),
        "device": str(backend.device),
        "method": str(sparsity.method),
        "keep": sparsity.keep,
        "density": sparsity.density,
    }


def _settings(request: Request) -> dict[str, Any]:
    plan, scoring = request.plan, request.scoring
    judged = {name: getattr(plan, name) for name in options_of((request.mode,))}
    sampling = to_json(plan.sampling) if request.seeds is not None else None
    return {
        "mode": request.mode,
        "period": "auto" if request.adaptive else request.period,
        "tree_width": "auto" if request.adaptive else request.widths[0],
        **judged,
        "confidence": plan.confidence,
        "refresh": request.refresh,
        "fallback": request.guarded,
        "lookup": request.lookup,
        "sampling": sampling,
        "seed": None if request.seeds is None else request.seeds[0],
        "processing": None if scoring is None else scoring.processing or None,
        "max_new_tokens": request.max_new_tokens,
    }
