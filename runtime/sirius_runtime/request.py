"""The options of `generate`, checked once against the program and the back end."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from sirius_runtime.errors import ConfigError, GenerationError, shown
from sirius_runtime.logits_options import LogitsOptions, Scoring, check_processors, merged
from sirius_runtime.lookup import LONGEST
from sirius_runtime.plan import Limits, Plan
from sirius_runtime.rules import OPTIONS, RULES, RuleNumbers, default_modes
from sirius_runtime.sampling import Sampling
from sirius_runtime.sizes import PREFILL_CHUNK, node_count
from sirius_runtime.spec import ProgramSpec

if TYPE_CHECKING:
    from sirius_runtime.logits_options import LogitsProcessor

DEFAULT_NEW_TOKENS = 256
MAX_PERIOD = PREFILL_CHUNK
MAX_NODES = 1024
AUTO: Literal["auto"] = "auto"
AUTO_PERIOD = 32  # the longest period that `auto` tries
AUTO_WIDTHS = (1, 2, 4, 8)
LOOKUP = 3
"""The n-gram length of look-up in runs where neither period nor width is given."""
FALLBACK = True
"""Whether runs in which neither period nor width is given have the guard (see `guard`)."""


class Mode(StrEnum):
    """Which path drafts, and how the full path accepts."""

    SIRIUS = "sirius"
    """The sparse path drafts; the full path verifies each period by the threshold."""
    EXACT = "exact"
    """As sirius, but a token passes only if it is the full path's argmax: dense greedy tokens."""
    SAMPLE = "sample"
    """As sirius, but tokens have the full path's distribution: lossless sampling."""
    FULL = "full"
    """The dense model, token by token."""
    SPARSE = "sparse"
    """The sparse path alone, never verified."""


def modes() -> tuple[str, ...]:
    """The names of all modes: one for each rule, and one for each path alone."""
    return (*RULES, Mode.FULL, Mode.SPARSE)


class FinishReason(StrEnum):
    """Why a row ended."""

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class Options:
    """The options of `generate` for drafting and choosing tokens; None: the artifact's default.

    See `SiriusModel.generate` for their meaning.
    """

    mode: Mode | str = Mode.SIRIUS
    rule: RuleNumbers = field(default_factory=RuleNumbers)
    period: int | str | None = None
    tree_width: int | None = None
    confidence: float | None = None
    refresh: int | None = None
    fallback: bool | None = None
    lookup: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | Sequence[int] | None = None
    logits: LogitsOptions = field(default_factory=LogitsOptions)
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Request:
    """A checked request, for the generation loop.

    `adaptive`: whether the controller chooses period and width; then `period` is the longest, and
    `widths` are those to choose from. Otherwise `widths` has the one tree width. `seeds` [rows]:
    None where nothing is drawn. `scoring`: None where logits are not processed and no
    log-probabilities are asked for. `graphs_serve`: whether the graphs `period` and `pick` can
    serve the request: they only know the compiled rules, process no logits and return no
    log-probabilities. `guarded`: whether to decode densely where drafts do not pay. `lookup`: n of
    the n-grams by which drafts are looked up; 0: no look-up.
    """

    mode: str
    period: int
    widths: tuple[int, ...]
    adaptive: bool
    plan: Plan
    refresh: int
    seeds: tuple[int, ...] | None
    max_new_tokens: int
    eos: frozenset[int]
    stop: tuple[str, ...]
    scoring: Scoring | None
    graphs_serve: bool
    guarded: bool
    lookup: int

    @property
    def whole_periods(self) -> bool:
        """Whether a period may run as one compiled graph."""
        return self.mode in RULES and self.graphs_serve


def check_tree(period: int, width: int, vocabulary: int, *, flag: str = "") -> None:
    """Raises ConfigError for a tree that can't be drafted. `flag`: prefix of the names in its
    message, ``--`` on a command line.
    """
    if not 1 <= period <= MAX_PERIOD:
        raise ConfigError(f"{flag}period must be in 1..{MAX_PERIOD}, got {period}")
    name = "--tree-width" if flag else "tree_width"
    if not 1 <= width <= vocabulary:
        raise ConfigError(f"{name} must be in 1..{vocabulary} (the vocabulary), got {width}")
    if node_count(period, width) > MAX_NODES:
        raise ConfigError(
            f"a period of {period} tokens in a tree of width {width} has "
            f"{node_count(period, width)} nodes, more than {MAX_NODES}: lower {flag}period or "
            f"{name}"
        )


def check_default_mode(mode: str, *, flag: str = "") -> None:
    """Raises ConfigError for a mode that can't be an artifact's default."""
    if mode not in (known := default_modes()):
        raise ConfigError(
            f"{flag}mode must be one of {', '.join(known)} (the greedy modes that draft), got "
            f"{shown(mode)}"
        )


def check_ranges(confidence: float, refresh: int, *, flag: str = "") -> None:
    """Raises ConfigError for values out of range."""
    if not 0.0 <= confidence <= 1.0:
        raise ConfigError(f"{flag}confidence must be in [0, 1], got {confidence}")
    if refresh < 0:
        raise ConfigError(f"{flag}refresh must be >= 0 (0: never), got {refresh}")


def read_options(
    options: Options,
    program: ProgramSpec,
    limits: Limits | None,
    *,
    prompt_lengths: Sequence[int],
    max_new_tokens: int | None,
    eos: frozenset[int],
    stop: tuple[str, ...],
    streams: bool = False,
    looks_up: bool = True,
) -> Request:
    """Checks `options` against the program and the back end's limits. streams: whether a
    verification streams weights; then the default period is ``auto``. looks_up: whether the back
    end accepts drafts that were looked up.

    Raises ConfigError, or GenerationError for prompts that are too long, naming the limit.
    """
    left = options.fallback is None and options.mode in RULES
    if streams and left and _guarded(options):
        # With the artifact's width only: in a short answer, trying other widths costs more than it
        # gains (a tree of width 8 and 15 levels has 121 nodes to verify).
        options = replace(options, period=AUTO, tree_width=program.period.tree_width)
    mode, default = options.mode, program.period
    if mode not in modes():
        raise ConfigError(f"mode must be one of {', '.join(modes())}, got {mode!r}")
    rows = len(prompt_lengths)
    scoring = _scoring(options, program)
    sampling, seeds = _sampling(options, mode, rows, program)
    serve = scoring is None and sampling.fits_graph and (mode in default.rules or mode not in RULES)
    if mode not in RULES or not serve:
        limits = None  # the entries run, which have no limits
    new_tokens = check_new_tokens(max(prompt_lengths), rows, max_new_tokens, program, limits)
    _check_least(options, new_tokens)
    adaptive = options.period == AUTO
    period, widths = _tree(options, program, limits)
    confidence = default.confidence if options.confidence is None else options.confidence
    refresh = _refresh(options, program)
    check_ranges(confidence, refresh)
    lookup = _lookup(options, mode, widths, looks_up)
    refresh = refresh if mode in RULES else 0  # modes of one path never choose neurons again
    plan = Plan(
        period=period,
        width=widths[0],
        rule=mode if mode in RULES else "sirius",
        confidence=confidence,
        sampling=sampling,
        ends=tuple(sorted(eos)),
        **{name: _first(options.rule.get(name), getattr(default, name)) for name in OPTIONS},
    )
    return Request(
        str(mode),
        period,
        widths,
        adaptive,
        plan,
        refresh,
        seeds,
        new_tokens,
        eos,
        stop,
        scoring,
        serve,
        mode in RULES and not adaptive and _first(options.fallback, _guarded(options)),
        lookup,
    )


def _lookup(options: Options, mode: str, widths: tuple[int, ...], looks_up: bool) -> int:
    """The n-gram length by which drafts are looked up; 0: no look-up."""
    if mode not in RULES:
        return 0
    given = options.lookup
    if given is None:
        alone = looks_up and widths == (1,) and options.fallback is not False
        return LOOKUP if alone and _guarded(options) else 0
    if not 0 <= given <= LONGEST:
        raise ConfigError(f"lookup must be in 0..{LONGEST} tokens (0: none), got {given}")
    if given and max(widths) > 1:
        raise ConfigError(
            f"lookup drafts chains, and tree_width is up to {max(widths)}: pass tree_width=1, or "
            "leave lookup out"
        )
    if given and not looks_up:
        raise ConfigError(
            "lookup: this back end runs a whole period as one graph or from a recording, in which "
            "only the sparse path drafts; use backend eager or inductor, or leave lookup out"
        )
    return given


def _check_least(options: Options, new_tokens: int) -> None:
    least = options.logits.get("min_new_tokens") or 0
    if least > new_tokens:
        raise ConfigError(
            f"min_new_tokens must be at most max_new_tokens ({new_tokens} here), got {least}: "
            "lower it, or give a larger max_new_tokens"
        )


def _guarded(options: Options) -> bool:
    """The default: on if neither period nor tree_width is given, and the rule draws no tokens."""
    rule, given = RULES[options.mode], (options.period, options.tree_width)
    return FALLBACK and not rule.draws and given == (None, None)


def _first(given: Any, default: Any) -> Any:
    return default if given is None else given


def _scoring(options: Options, program: ProgramSpec) -> Scoring | None:
    """How logits are processed and reported; None where they are not."""
    vocabulary, count = program.model.vocab_size, options.logprobs
    if count is not None and not 0 <= count <= vocabulary:
        raise ConfigError(f"logprobs must be in 0..{vocabulary} (the vocabulary), got {count}")
    spec = merged(options.logits, program.generation.logits, vocabulary)
    own = check_processors(options.logits_processor)
    if spec.changes_nothing and not own and count is None:
        return None
    return Scoring(spec, own, count)


def _tree(
    options: Options, program: ProgramSpec, limits: Limits | None
) -> tuple[int, tuple[int, ...]]:
    """The (longest) period, and the tree widths that it may have."""
    vocabulary, default = program.model.vocab_size, program.period
    if isinstance(options.period, str):
        if options.period != AUTO:
            raise ConfigError(f"period must be a number or 'auto', got {shown(options.period)}")
        if limits is not None:
            raise ConfigError(
                "period 'auto' needs separate times for drafting and verification, which a "
                "compiled period does not have: give a number, or use backend eager"
            )
        if options.tree_width is None:
            return AUTO_PERIOD, tuple(width for width in AUTO_WIDTHS if width <= vocabulary)
        check_tree(AUTO_PERIOD, options.tree_width, vocabulary)
        return AUTO_PERIOD, (options.tree_width,)
    period = default.period if options.period is None else options.period
    width = default.tree_width if options.tree_width is None else options.tree_width
    check_tree(period, width, vocabulary)
    if limits is not None and period > limits.period:
        raise ConfigError(
            f"period must be in 1..{limits.period} here, got {period}: the graph was compiled for "
            "that; compile the model with a larger --period, or use backend eager"
        )
    if limits is not None and width != limits.tree_width:
        raise ConfigError(
            f"tree_width must be {limits.tree_width} here, got {width}: the graph was compiled "
            "for that; compile the model with another --tree-width, or use backend eager"
        )
    return period, (width,)


def _sampling(
    options: Options, mode: str, rows: int, program: ProgramSpec
) -> tuple[Sampling, tuple[int, ...] | None]:
    """The distribution to draw from, and each row's seed; no seeds where the run is greedy."""
    given = {
        name: value
        for name in ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
        if (value := getattr(options, name)) is not None
    }
    rule = RULES.get(mode)
    if rule is not None and not rule.draws and given:
        raise ConfigError(
            f"{', '.join(given)}: mode {mode} is greedy; use mode sample (or full, or sparse)"
        )
    if (rule is None or not rule.draws) and not given:
        return Sampling(), None
    seed = given.pop("seed", None)
    if seed is None:
        seed = secrets.randbits(32)
    seeds = tuple(range(seed, seed + rows)) if isinstance(seed, int) else tuple(seed)
    if len(seeds) != rows:
        raise ConfigError(f"seed: {len(seeds)} seeds for {rows} rows; give one, or one per row")
    if min(seeds) < 0:
        raise ConfigError(f"seed must be >= 0, got {min(seeds)}")
    return Sampling(**program.generation.sampling.non_defaults() | given), seeds


def _refresh(options: Options, program: ProgramSpec) -> int:
    if options.refresh is None:
        return program.period.refresh
    if options.refresh and not program.sparsity.method.per_prompt:
        raise ConfigError(
            f"refresh applies to griffin, but the artifact's sparse path is "
            f"{program.sparsity.method}, which does not select neurons once per prompt: leave it "
            "out"
        )
    return options.refresh


def check_new_tokens(
    longest: int, rows: int, wanted: int | None, program: ProgramSpec, limits: Limits | None
) -> int:
    """How many tokens to generate after prompts of at most `longest` tokens.

    Raises GenerationError, naming the limit, where prompts are too long or rows too many.
    """
    limit, name = program.model.max_seq_len, "max_seq_len"
    remedy = "compile with a larger --max-seq-len where the model's positions allow it"
    if limits is not None and limits.context is not None and limits.context < limit:
        limit, name, remedy = limits.context, "context", "load the artifact with a larger context"
    if limits is not None and limits.rows is not None and rows > limits.rows:
        raise GenerationError(
            f"the batch has {rows} rows, but the graph was compiled for {limits.rows}; split it, "
            "or load the artifact with more rows"
        )
    room = limit - longest
    if room < 1:
        raise GenerationError(
            f"the prompt has {longest} tokens, but the artifact serves sequences of {limit} "
            f"({name}); shorten it, or {remedy}"
        )
    if wanted is None:
        return min(room, DEFAULT_NEW_TOKENS)
    if not 1 <= wanted <= room:
        raise GenerationError(
            f"max_new_tokens must be in 1..{room} here ({name} is {limit} tokens, the prompt has "
            f"{longest}), got {wanted}"
        )
    return wanted
