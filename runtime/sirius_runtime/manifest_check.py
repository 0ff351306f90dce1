"""Checks a manifest's values: each number's range, and the fields that depend on one another.

`spec.from_json` has checked the types before. `graph_check` checks the graphs against the
manifest's entries, weights and cache sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from sirius_runtime.errors import ArtifactError, ConfigError
from sirius_runtime.logits_options import MOST_TOKENS, check_generation
from sirius_runtime.request import check_default_mode, check_ranges, check_tree
from sirius_runtime.rules import check_options
from sirius_runtime.spec import (
    AcceptanceSpec,
    DraftingSpec,
    FileRecord,
    Layout,
    Manifest,
    Method,
    ModelSpec,
    PassRecord,
    PeriodSpec,
    ProgramSpec,
    SearchSpec,
    SelfTestRun,
    SelfTestSpec,
    SettingSpec,
    SiteSpec,
    SparsitySpec,
    StateSpec,
    WeightSpec,
)

_MOST_LAYERS = 2**14
_MOST_WIDE = 2**20  # heads, and head dimensions
_MOST_PARAMETERS = 2**53  # up to here a float is exact
MOST_PROMPT_TOKENS = 64  # of a self-test, so that it takes no longer than an answer's first token
MOST_BLOCK_TOKENS = 16

Range = tuple[float, float | None]
"""The least and the largest value of a number; None: no upper limit."""

_SHARE: Range = (0.0, 1.0)
_TOKENS: Range = (1, MOST_TOKENS)
_COUNT: Range = (0, None)
_TOKEN_ID: Range = (-MOST_TOKENS, MOST_TOKENS)  # some configs have -1 for "none"

RANGES: dict[type, dict[str, Range]] = {
    ModelSpec: {
        "vocab_size": _TOKENS,
        "max_seq_len": _TOKENS,
        "parameters": (0, _MOST_PARAMETERS),
    },
    StateSpec: {
        "layers": (1, _MOST_LAYERS),
        **dict.fromkeys(("kv_heads", "key_dim", "value_dim"), (1, _MOST_WIDE)),
    },
    SparsitySpec: {"keep": _SHARE, "density": _SHARE, "step": (0, _MOST_PARAMETERS)},
    SiteSpec: {"units": _TOKENS, "params": (0, _MOST_PARAMETERS)},
    PeriodSpec: {"refresh": (0, MOST_TOKENS)},
    AcceptanceSpec: {
        "drafts": _TOKENS,
        "density": _SHARE,
        "agreement": _SHARE,
        "accepted": _SHARE,
    },
    DraftingSpec: {"period": _TOKENS, "confidence": _SHARE},
    SettingSpec: {
        "keep": _SHARE,
        "texts": _TOKENS,
        "drafts": _TOKENS,
        "density": _SHARE,
        "agreement": _SHARE,
        "interval": _COUNT,
    },
    SearchSpec: {"agreement": _SHARE, "chosen": _COUNT},
    PassRecord: dict.fromkeys(("rewrites", "seconds", "nodes_before", "nodes_after"), _COUNT),
    ProgramSpec: {"eos_token_ids": _TOKEN_ID, "pad_token_id": _TOKEN_ID},
    FileRecord: {"size": _COUNT},
    SelfTestSpec: {"prompt": (0, MOST_TOKENS), "block": (0, MOST_TOKENS)},
    SelfTestRun: {"rms": _COUNT, "tokens": (0, MOST_TOKENS)},
}
"""The ranges that do not depend on other fields, by class and field. For a list, the range is that
of each number in it. `manifest_schema` copies them to the JSON Schema.
"""


def check_manifest(manifest: Manifest) -> None:
    """Raises ArtifactError, naming the field, where a value is out of range."""
    check_program(manifest.program)
    for name, record in manifest.files.items():
        _check_ranges(record, f"files[{name!r}].")
    if manifest.self_test is not None:
        _check_self_test(manifest.self_test, manifest.program.model)


def check_program(program: ProgramSpec) -> None:
    """Raises ArtifactError, naming the field, where a value is out of range."""
    _check_ranges(program, "")
    _check_period(program.period, program.model, program.sparsity.method)
    _check_sparsity(program.sparsity, program.state)
    for weight in program.weights:
        if weight.nested is not None:
            _check_nested(weight)
    if program.acceptance is not None:
        for drafting in (program.acceptance.best, *program.acceptance.periods):
            _check_drafting(drafting, "acceptance")
    if program.search is not None:
        _within(0, len(program.search.settings) - 1, program.search.chosen, "search.chosen")
        for setting in program.search.settings:
            _check_drafting(setting.best, "search")
    vocabulary = program.model.vocab_size
    _as_options(lambda: check_generation(program.generation, vocabulary), "generation")
    names = [entry.name for entry in program.entries]
    for name in names:
        if names.count(name) > 1:
            raise ArtifactError(f"entries: {name!r} is listed twice")


def _check_ranges(value: Any, where: str) -> None:
    """Checks every number in `value`, also in nested specs, against its range in `RANGES`."""
    ranges = RANGES.get(type(value), {})
    for field in fields(value):
        inner, name = getattr(value, field.name), f"{where}{field.name}"
        if field.name in ranges:
            least, most = ranges[field.name]
            for number in _numbers(inner):
                _within(least, most, number, name)
        elif is_dataclass(inner):
            _check_ranges(inner, f"{name}.")
        elif isinstance(inner, tuple) and inner and is_dataclass(inner[0]):
            for index, one in enumerate(inner):
                _check_ranges(one, f"{name}[{index}].")


def _numbers(value: Any) -> Iterator[float]:
    """The numbers of a field: the field itself, or those of a list (of lists). None has none."""
    if isinstance(value, tuple):
        for one in value:
            yield from _numbers(one)
    elif value is not None:
        yield value


def _check_self_test(test: SelfTestSpec, model: ModelSpec) -> None:
    _check_ranges(test, "self_test.")
    for name, tokens, most in (
        ("prompt", test.prompt, MOST_PROMPT_TOKENS),
        ("block", test.block, MOST_BLOCK_TOKENS),
    ):
        _within(1, most, len(tokens), f"self_test: the length of {name}")
    _within(2, model.max_seq_len, len(test.prompt) + len(test.block), "self_test: its length")
    for token in _numbers((test.prompt, test.block, tuple(run.tokens for run in test.runs))):
        _within(0, model.vocab_size - 1, token, "self_test: a token")
    for run in test.runs:
        sizes = {len(run.rms), len(run.tokens), len(run.logits)}
        likeliest = {*map(len, run.tokens), *map(len, run.logits)}
        if len(sizes) != 1 or len(likeliest) != 1 or 0 in likeliest:
            raise ArtifactError(
                f"self_test: the run of {run.entry!r} has lists that differ in length"
            )


def _check_period(period: PeriodSpec, model: ModelSpec, method: Method) -> None:
    _as_options(lambda: check_tree(period.period, period.tree_width, model.vocab_size))
    _as_options(lambda: check_options(period))
    _as_options(lambda: check_ranges(period.confidence, period.refresh))
    _as_options(lambda: check_default_mode(period.mode))
    if period.refresh and not method.per_prompt:
        raise ArtifactError(
            f"period.refresh is {period.refresh}, but the sparse path {method} chooses its neurons "
            "for every token, so it must be 0"
        )


def _check_drafting(drafting: DraftingSpec, where: str) -> None:
    _within(1.0, drafting.period, drafting.aal, f"{where}: aal")
    _within(0.0, drafting.period, drafting.steps, f"{where}: steps")
    _within(0.0, drafting.period, drafting.effective_density, f"{where}: effective_density")


def _check_sparsity(sparsity: SparsitySpec, state: StateSpec) -> None:
    _within(1 if sparsity.sites else 0, _MOST_PARAMETERS, sparsity.step, "sparsity.step")
    if sparsity.draft_bits not in (None, 4, 8):
        raise ArtifactError(f"sparsity.draft_bits must be 4 or 8, found {sparsity.draft_bits}")
    for layer in sparsity.dense_layers:
        _within(0, state.layers - 1, layer, "sparsity.dense_layers")
    for index, site in enumerate(sparsity.sites):
        where = f"sparsity.sites[{index}]"
        _within(0, state.layers - 1, site.layer, f"{where}.layer")
        _within(0, site.units, site.kept, f"{where}.kept")
    if sparsity.method.per_prompt:
        fixed = [site for site in sparsity.sites if not site.counted]
        if any(site.kept < 1 for site in fixed):
            raise ArtifactError("sparsity.sites: a prompt must keep a neuron of each MLP")


def _check_nested(weight: WeightSpec) -> None:
    planes, *matrix = weight.shape or (0,)
    rank, row = (2, 17) if weight.nested is Layout.BY_OUTPUTS else (3, 34)
    sound = planes == 2 and len(matrix) in (rank, rank + 1) and min(matrix) > 0
    sound = sound and matrix[-rank + 1] % row == 0
    if weight.dtype != "uint8" or weight.retype or not sound:
        raise ArtifactError(
            f"weight {weight.name!r} is nested by {weight.nested}, but {weight.dtype} "
            f"{list(weight.shape)} can't hold such a weight"
        )


def _as_options(check: Callable[[], None], where: str = "period") -> None:
    """Runs an option's own check on the manifest's default, and raises its error as an
    ArtifactError.
    """
    try:
        check()
    except ConfigError as error:
        raise ArtifactError(f"{where}: {error}") from error


def _within(least: float, most: float | None, value: float, field: str) -> None:
    if most is None and value < least:
        raise ArtifactError(f"{field} must be >= {least}, found {value}")
    if most is not None and not least <= value <= most:
        raise ArtifactError(f"{field} must be in {least}..{most}, found {value}")
