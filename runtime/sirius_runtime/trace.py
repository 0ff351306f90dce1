"""Traces: the drafts, the full path's verdicts and the commits of each period of one answer.

`Generation` passes each `Period` and its evidence to a `Tracer`, which reads the tensors from the
device and converts them to Python numbers. Without a tracer nothing is read.
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
"""Version of the records' format; it changes when their fields do."""
_CONTEXT = 8  # tokens before a token that are decoded with it


class Fate(StrEnum):
    """Whether a drafted token was accepted."""

    KEPT = "kept"
    """It was accepted."""
    REFUSED = "refused"
    """The token before it was accepted, and the full path refused this one."""
    DROPPED = "dropped"
    """It follows a refused token, or is on another path of the tree than the accepted one."""


class Kind(StrEnum):
    """The kinds of findings."""

    OVER_CORRECTION = "over-correction"
    """A drafted token was refused although it is the full path's argmax. The correction is the same
    token, and the drafted tokens behind it were dropped needlessly.
    """
    UNDER_CORRECTION = "under-correction"
    """A drafted token was accepted although it is not the full path's argmax. At the first such
    token, the answer departs from that of dense greedy decoding.
    """
    CACHE_INCONSISTENCY = "cache-inconsistency"
    """The K/V of committed tokens differs from that of a dense run over the same tokens."""


@dataclass(frozen=True)
class Finding:
    """A finding at a drafted token. `position`: its index in the answer; `full`: its probability by
    the full path; `instead`: the full path's argmax at that place; `departs`: whether the answer
    departs from that of dense greedy decoding here, for the first time.
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

    full: its probability after its parent by the full path, as the mode's rule uses it; sparse: by
    the sparse path; None where that is not finite. likeliest: whether it is the full path's argmax.
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
    """A token of the full path, and its probability; None where that is not known."""

    token: int
    text: str | None
    full: float | None


@dataclass(frozen=True)
class Step:
    """A period, or a dense step.

    position: index of its first token in the answer. period, width: K and w of the draft. draft:
    its nodes, level by level. emitted: the full path's token after the accepted ones; corrects:
    whether a token was refused in its place. advance: the number of committed tokens; tokens: those
    of them that are part of the answer, which may end among them. reason: why a step is dense; None
    for periods. looked_up: whether the draft was copied from the text so far (prompt look-up).
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
        """The step as a JSON object."""
        fields = to_json(self)
        assert isinstance(fields, dict)
        kind = "period" if fields.pop("way") == Way.DRAFT else "dense"
        return {"type": kind} | fields


@dataclass(frozen=True)
class Tracing:
    """Options of a trace. listener: is called with each step after its tokens are committed.
    check_kv: at the end, compare the caches with those of a dense run over the same tokens.
    """

    listener: Callable[[Step], None] | None = None
    check_kv: bool = False


@dataclass(frozen=True)
class Trace:
    """The trace of one answer. first: its first token, which the prefill gives."""

    model: dict[str, Any]
    settings: dict[str, Any]
    prompt: tuple[int, ...]
    prompt_text: str | None
    first: Emitted
    steps: tuple[Step, ...]
    cache: CacheCheck | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return (self.first.token, *(token for step in self.steps for token in step.tokens))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of all steps. Those of the caches are in `cache.differences`."""
        return tuple(finding for step in self.steps for finding in step.findings)

    def count(self, kind: Kind) -> int:
        """The number of findings of this kind."""
        if kind is Kind.CACHE_INCONSISTENCY:
            return 0 if self.cache is None else self.cache.inconsistent
        return sum(finding.kind is kind for finding in self.findings)

    def records(self) -> Iterator[dict[str, Any]]:
        """The trace as JSON objects: a header, the first token, each step, the check of the caches,
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
            f"a trace shows drafts, and mode {request.mode} makes none: use mode "
            f"{', '.join(RULES)}, or leave trace out"
        )
    if rows != 1:
        raise GenerationError(
            f"a trace covers one row, the batch has {rows}: trace them one by one"
        )
    if not backend.explains:
        raise ConfigError(
            f"a trace needs backend eager: {type(backend).__name__} does not return its drafts and "
            "logits; load the artifact with backend='eager', or leave trace out"
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
        self._history = list(prompt)  # then all committed tokens, part of the answer or not
        self._taken, self._departed = 0, False
        self._steps: list[Step] = []
        text = None if tokenizer is None else tokenizer.decode(prompt, skip_special_tokens=False)
        nothing = Emitted(0, None, None)
        self._trace = Trace(_model(backend), _settings(request), tuple(prompt), text, nothing, ())

    @property
    def trace(self) -> Trace:
        return replace(self._trace, steps=tuple(self._steps))

    def first(self, token: int) -> None:
        """Adds the first token, which the prefill gives."""
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
        """Adds a period or dense step. `taken`: its tokens that are part of the answer."""
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
        """Checks the caches, if asked for. `fresh`: opens an empty state for so many tokens."""
        if not self.tracing.check_kv:
            return
        from sirius_runtime.kv_check import check_kv

        tokens = self._history[:-1]  # the last one's K/V is not computed yet
        self._trace = replace(self._trace, cache=check_kv(state, fresh(len(tokens)), tokens))

    def _stepped(self, plan: Plan, done: Period) -> Emitted:
        [token] = done.rows[0].tokens
        full = None
        if not self._processes:  # a step's evidence has the logits before processing
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
            """A token after a node, with its text and its probability by the full path."""
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
        if not RULES[plan.rule].draws:  # sampling must refuse and accept by chance
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
        """A token's text; or its name in the vocabulary, if it has no text of its own (a special
        token, or bytes of an unfinished character).
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
    """The kind of finding at a drafted token under a greedy rule; None if there is none."""
    if one.fate is Fate.KEPT and not one.likeliest:
        return Kind.UNDER_CORRECTION
    if one.fate is Fate.REFUSED and one.likeliest:
        return Kind.OVER_CORRECTION
    return None


class _Full:
    """The full path's probabilities after each node, from its logits [N, V], as the mode's rule
    computes them.
    """

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
    """The sparse path's probability of each node's token after its parent: by the distribution that
    it was drawn from, or in greedy drafts at verify_temperature, at which drafts are scored.
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
    """The value; None where it is not finite, because JSON has no such numbers."""
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
