"""What a manifest may say: every number in its range, and those that depend on each other agreeing.

`spec.from_json` has checked each value's type. What a graph must agree with (entries, weights, the
caches' sizes) is checked against the graphs (`graph_check`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sirius_runtime.errors import ArtifactError, ConfigError
from sirius_runtime.logits_options import MOST_TOKENS, check_generation
from sirius_runtime.request import check_ranges, check_tree
from sirius_runtime.rules import check_options
from sirius_runtime.spec import (
    AcceptanceSpec,
    Method,
    ModelSpec,
    PeriodSpec,
    ProgramSpec,
    SiteSpec,
    SparsitySpec,
    StateSpec,
)

_MOST_LAYERS = 2**14
_MOST_WIDE = 2**20  # heads, and dimensions of one
_MOST_PARAMETERS = 2**53  # up to which a float counts exactly


def check_program(program: ProgramSpec) -> None:
    """Raises ArtifactError, naming the field, where a value is out of range."""
    check_model(program.model)
    check_state(program.state)
    _check_sparsity(program.sparsity, program.state)
    check_period(program.period, program.model, program.sparsity.method)
    if program.acceptance is not None:
        check_acceptance(program.acceptance)
    check_ids(program.eos_token_ids)
    if program.pad_token_id is not None:
        check_ids((program.pad_token_id,), "pad_token_id")
    vocabulary = program.model.vocab_size
    _as_options(lambda: check_generation(program.generation, vocabulary), "generation")
    names = [entry.name for entry in program.entries]
    for name in names:
        if names.count(name) > 1:
            raise ArtifactError(f"entries: {name!r} stands there twice")
    for index, record in enumerate(program.passes):
        for field in ("rewrites", "seconds", "nodes_before", "nodes_after"):
            _at_least(0, getattr(record, field), f"passes[{index}].{field}")


def check_model(model: ModelSpec) -> None:
    """As `check_program`, of the model."""
    _within(1, MOST_TOKENS, model.vocab_size, "model.vocab_size")
    _within(1, MOST_TOKENS, model.max_seq_len, "model.max_seq_len")
    _within(0, _MOST_PARAMETERS, model.parameters, "model.parameters")


def check_state(state: StateSpec) -> None:
    """As `check_program`, of the caches."""
    _within(1, _MOST_LAYERS, state.layers, "state.layers")
    for field in ("kv_heads", "key_dim", "value_dim"):
        _within(1, _MOST_WIDE, getattr(state, field), f"state.{field}")


def check_period(period: PeriodSpec, model: ModelSpec, method: Method) -> None:
    """As `check_program`, of the period's defaults."""
    _as_options(lambda: check_tree(period.period, period.tree_width, model.vocab_size))
    _as_options(lambda: check_options(period))
    _as_options(lambda: check_ranges(period.confidence, period.refresh))
    _at_most(MOST_TOKENS, period.refresh, "period.refresh")
    if period.refresh and not method.per_prompt:
        raise ArtifactError(
            f"period.refresh is {period.refresh}, but the sparse path {method} chooses its neurons "
            "for every token, so it must be 0"
        )


def check_acceptance(acceptance: AcceptanceSpec) -> None:
    """As `check_program`, of what the compiler measured of drafts."""
    _within(1, MOST_TOKENS, acceptance.drafts, "acceptance.drafts")
    for name in ("density", "agreement"):
        _within(0.0, 1.0, getattr(acceptance, name), f"acceptance.{name}")
    for share in acceptance.accepted:
        _within(0.0, 1.0, share, "acceptance.accepted")
    for drafting in (acceptance.best, *acceptance.periods):
        _within(1, MOST_TOKENS, drafting.period, "acceptance: period")
        _within(0.0, 1.0, drafting.confidence, "acceptance: confidence")
        _within(1.0, drafting.period, drafting.aal, "acceptance: aal")
        _within(0.0, drafting.period, drafting.steps, "acceptance: steps")
        _within(0.0, drafting.period, drafting.effective_density, "acceptance: effective_density")


def check_ids(ids: tuple[int, ...], field: str = "eos_token_ids") -> None:
    """As `check_program`, of token ids; those that are no token's (-1) do no harm."""
    for token in ids:
        _within(-MOST_TOKENS, MOST_TOKENS, token, field)


def _check_sparsity(sparsity: SparsitySpec, state: StateSpec) -> None:
    _within(0.0, 1.0, sparsity.keep, "sparsity.keep")
    _within(0.0, 1.0, sparsity.density, "sparsity.density")
    _within(1 if sparsity.sites else 0, _MOST_PARAMETERS, sparsity.step, "sparsity.step")
    for layer in sparsity.dense_layers:
        _within(0, state.layers - 1, layer, "sparsity.dense_layers")
    for index, site in enumerate(sparsity.sites):
        _check_site(site, state, f"sparsity.sites[{index}]")
    if sparsity.method.per_prompt:
        fixed = [site for site in sparsity.sites if not site.counted]
        if any(site.kept < 1 for site in fixed):
            raise ArtifactError("sparsity.sites: a prompt must keep a neuron of each MLP")


def _check_site(site: SiteSpec, state: StateSpec, where: str) -> None:
    _within(0, state.layers - 1, site.layer, f"{where}.layer")
    _within(1, MOST_TOKENS, site.units, f"{where}.units")
    _within(0, site.units, site.kept, f"{where}.kept")
    _within(0, _MOST_PARAMETERS, site.params, f"{where}.params")


def _as_options(check: Callable[[], None], where: str = "period") -> None:
    """A default is held to what the option itself is."""
    try:
        check()
    except ConfigError as error:
        raise ArtifactError(f"{where}: {error}") from error


def _within(least: Any, most: Any, value: Any, field: str) -> None:
    if not least <= value <= most:
        raise ArtifactError(f"{field} must be in {least}..{most}, found {value}")


def _at_least(least: Any, value: Any, field: str) -> None:
    if not value >= least:
        raise ArtifactError(f"{field} must be >= {least}, found {value}")


def _at_most(most: Any, value: Any, field: str) -> None:
    if not value <= most:
        raise ArtifactError(f"{field} must be <= {most}, found {value}")
