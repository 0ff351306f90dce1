"""The artifact's manifest: frozen dataclasses, and their conversion to and from JSON.

The compiler fills them in, the artifact's `manifest.json` holds them, and the runtime reads them.
Shapes use letters for symbolic sizes: `B` rows of the batch, `T` tokens of the call, `M` block
slots, `S` cache slots; numbers are static.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from sirius_runtime.errors import ArtifactError, shown
from sirius_runtime.logits_options import GenerationSpec
from sirius_runtime.rules import RuleOptions

FORMAT_VERSION = (1, 1)
"""Major: a reader refuses versions that it does not know. Minor: additions that older readers
ignore (docs/format.md lists them).
"""
NESTED_FORMAT_VERSION = (3, 0)
"""The version of artifacts with nested weights. Others have `FORMAT_VERSION`, so that older readers
can read them.
"""
KNOWN_MAJORS = (FORMAT_VERSION[0], NESTED_FORMAT_VERSION[0])

JSON = Any  # None, bool, int, float, str, list[JSON], dict[str, JSON]
_T = TypeVar("_T")
_INT64 = 2**63


class Method(StrEnum):
    """How the sparse path chooses the weights that it reads (see the `sparsify_*` passes). The
    properties say all that other code needs to know of a method.
    """

    GRIFFIN = "griffin"
    TOPK = "topk"
    CATS = "cats"
    TEAL = "teal"
    GRIFFIN_TEAL = "griffin+teal"
    EXPERTS = "experts"
    NONE = "none"

    @property
    def per_prompt(self) -> bool:
        """Whether neurons are chosen by the prompt; the state then has `neurons`."""
        return self in (Method.GRIFFIN, Method.GRIFFIN_TEAL)

    @property
    def has_thresholds(self) -> bool:
        """Whether calibrated thresholds choose what a token keeps; the number kept then varies."""
        return self in (Method.CATS, Method.TEAL, Method.GRIFFIN_TEAL)

    @property
    def skips_channels(self) -> bool:
        """Whether linears skip input channels."""
        return self in (Method.TEAL, Method.GRIFFIN_TEAL)

    @property
    def rewrites_mlps(self) -> bool:
        """Whether it skips neurons or experts; the compiler then recognises MLPs first."""
        return self not in (Method.TEAL, Method.NONE)

    @property
    def for_dense_models(self) -> bool:
        """Whether it applies to models without mixtures of experts."""
        return self not in (Method.EXPERTS, Method.NONE)

    @property
    def for_mixtures(self) -> bool:
        """Whether it applies to models with mixtures of experts."""
        return self in (Method.TOPK, Method.EXPERTS)


class DType(StrEnum):
    """The dtypes of weights and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Layout(StrEnum):
    """The layout of a nested weight: what a stored row belongs to (see `sirius_runtime.nested`)."""

    BY_OUTPUTS = "outputs"
    BY_INPUTS = "inputs"


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of an entry. `dtype` is a torch dtype name, or ``model`` for the program's
    dtype.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class EntrySpec:
    """One callable graph of the program: `prefill`, `sparse`, `full`, `observe` or `period`."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class WeightSpec:
    """One stored tensor.

    `shape` and `dtype` are those of the stored bytes. `transposed`: whether it is the transpose of
    the checkpoint's tensor, in the layout that kernels read. `retype`: whether it is converted to
    the dtype asked for at load (rotary frequencies are not, nor weights that a 16-bit model keeps
    in float32). `parameter`: whether it is a floating point parameter of the model, not a constant.
    `nested`: the layout of a nested weight, whose bytes hold both planes; null for other weights.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False
    retype: bool = True
    parameter: bool = True
    nested: Layout | None = None

    @property
    def numbers(self) -> int:
        """The number of elements: of the matrix, for a nested weight."""
        stored = math.prod(self.shape)
        # In both planes together, 16 of every 17 bytes hold nibbles: one byte per element.
        return stored if self.nested is None else stored // 17 * 16

    @property
    def of_experts(self) -> bool:
        """Whether it holds a matrix for each expert of a mixture."""
        matrix = {None: 2, Layout.BY_OUTPUTS: 3, Layout.BY_INPUTS: 4}[self.nested]
        return len(self.shape) == matrix + 1


@dataclass(frozen=True)
class StateSpec:
    """The key/value cache: k [layers, B, kv_heads, S, key_dim], v [layers, B, kv_heads, S,
    value_dim].
    """

    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class SiteSpec:
    """A place where a sparse step skips units: the neurons of an MLP, the input channels of a
    linear, or a token's experts.

    `weight`: the (first) weight whose rows or columns are skipped. `units`: the number of neurons,
    channels or experts; in a mixture, of those that a token is routed to. `kept`: how many of them
    a step keeps; where `threshold` is given, the mean expected from calibration. `params`: the
    bytes of weights that a sparse step saves by skipping one unit (in older artifacts a number of
    parameters; only its ratio to `step` is used). `counted`: whether the number kept differs
    between tokens, so that the step returns it in its output `kept`.
    """

    layer: int
    weight: str
    units: int
    kept: float
    params: int
    threshold: float | None = None
    counted: bool = False


@dataclass(frozen=True)
class SparsitySpec:
    """The sparse path. `keep`: the requested share of neurons or channels.

    `sites`: where it skips, in the graph's order. `dense_layers`: the layers that skip nothing.
    `step`: bytes of weights that a full step over one token reads: all weights except the experts
    that the token is not routed to. `density`: the share of these bytes that a sparse step reads,
    embeddings and lm_head included. `draft_bits`: the bits of nested weights that a sparse step
    reads; null without nested weights.
    """

    method: Method
    keep: float
    sites: tuple[SiteSpec, ...] = ()
    dense_layers: tuple[int, ...] = ()
    step: int = 0
    density: float = 1.0
    draft_bits: int | None = None

    @property
    def counted(self) -> tuple[SiteSpec, ...]:
        """The sites with `counted`, in the order of the output `kept`."""
        return tuple(site for site in self.sites if site.counted)

    @property
    def neurons(self) -> int:
        """griffin: neurons of each MLP; else 0."""
        return self._fixed.units if self._fixed else 0

    @property
    def kept_neurons(self) -> int:
        """griffin: neurons that a prompt keeps of each MLP; else 0."""
        return int(self._fixed.kept) if self._fixed else 0

    @property
    def _fixed(self) -> SiteSpec | None:
        if not self.method.per_prompt:
            return None
        return next((site for site in self.sites if not site.counted), None)


@dataclass(frozen=True)
class PeriodSpec(RuleOptions):
    """Defaults of the period: `period` tokens (K) in trees of `tree_width` (w); the options of its
    rules; the `confidence` that a draft needs to go on; the number of periods after which `griffin`
    selects its neurons again (`refresh`; 0: never); and the `mode` of runs that name none.

    `period` and `tree_width` are also the static sizes of the entry `period`. `rules` are the rules
    that this entry knows, in the order of its input `rule`.
    """

    period: int = 16
    tree_width: int = 1
    confidence: float = 0.0
    refresh: int = 0
    rules: tuple[str, ...] = ("sirius", "exact", "sample")
    mode: str = "sirius"


@dataclass(frozen=True)
class DraftingSpec:
    """Measured results of periods of `period` tokens whose drafts stop below `confidence`, as means
    over drafts: `aal`, the tokens committed by a period; `steps`, its sparse steps; and the
    `effective_density` that follows from both.
    """

    period: int
    confidence: float
    aal: float
    steps: float
    effective_density: float


@dataclass(frozen=True)
class AcceptanceSpec:
    """Acceptance of the sparse path's drafts on held-out text, measured by the compiler: `drafts`
    teacher-forced drafts from `texts` texts, accepted by this `threshold` and `verify_temperature`.

    `density`: that of the sparse steps. `agreement`: share of drafted tokens that are the full
    path's argmax. `accepted`: share of drafts whose first 1, 2, … tokens all pass. `periods`:
    results for several period sizes, without confidence. `best`: the result with the fewest weight
    reads per token, of all periods and confidences.
    """

    texts: int
    drafts: int
    threshold: float
    verify_temperature: float
    density: float
    agreement: float
    accepted: tuple[float, ...]
    periods: tuple[DraftingSpec, ...]
    best: DraftingSpec

    @property
    def passes(self) -> float:
        """The probability that a drafted token passes if all tokens before it in the draft do."""
        return sum(self.accepted) / (1.0 + sum(self.accepted[:-1]))


@dataclass(frozen=True)
class SettingSpec:
    """A setting of the sparse path that the compiler's search measured: `method` with the kept
    share `keep`.

    `texts`, `drafts`, `density`, `agreement`, `best`: as in `AcceptanceSpec`. `interval`: the 95%
    confidence interval (low, high) of the best effective density, by bootstrap over texts.
    """

    method: Method
    keep: float
    texts: int
    drafts: int
    density: float
    agreement: float
    best: DraftingSpec
    interval: tuple[float, float]


@dataclass(frozen=True)
class SearchSpec:
    """The compiler's search for the sparse path with the fewest weight reads per token.

    `agreement`: the least agreement that was asked for; null if none was. `settings`: those that
    were measured, all on the same held-out text. `chosen`: the index of the one that was compiled.
    """

    agreement: float | None
    settings: tuple[SettingSpec, ...]
    chosen: int


@dataclass(frozen=True)
class ModelSpec:
    """The compiled model. `parameters` counts each stored parameter once (tied weights once)."""

    source: str
    revision: str | None
    model_type: str
    dtype: DType
    vocab_size: int
    max_seq_len: int
    parameters: int


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: the number of its rewrites, its time, and the number of nodes before and
    after.

    `seconds` is always 0 in a file, so that equal inputs give equal bytes. Readers of version 1.0
    need the field.
    """

    name: str
    rewrites: int
    seconds: float
    nodes_before: int
    nodes_after: int


@dataclass(frozen=True)
class ToolVersions:
    """Versions that the artifact was compiled with."""

    sirius: str
    torch: str
    transformers: str


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 (hex) of one entry of the ZIP."""

    size: int
    sha256: str


@dataclass(frozen=True)
class ProgramSpec:
    """Everything that the runtime needs to know about a program besides its graphs and weights."""

    model: ModelSpec
    entries: tuple[EntrySpec, ...]
    weights: tuple[WeightSpec, ...]
    state: StateSpec
    sparsity: SparsitySpec
    period: PeriodSpec
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    passes: tuple[PassRecord, ...]
    tools: ToolVersions
    generation: GenerationSpec = GenerationSpec()  # noqa: RUF009  (frozen)
    acceptance: AcceptanceSpec | None = None
    search: SearchSpec | None = None

    @property
    def nested(self) -> bool:
        """Whether any weight is nested."""
        return any(weight.nested is not None for weight in self.weights)

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of the model's parameters, if each one that is not nested takes `itemsize`."""
        return sum(
            weight.numbers * itemsize if weight.nested is None else math.prod(weight.shape)
            for weight in self.weights
            if weight.parameter
        )

    def entry(self, name: str) -> EntrySpec:
        """The entry of that name; raises ArtifactError where there is none."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        known = ", ".join(e.name for e in self.entries)
        raise ArtifactError(f"the program has no entry {name!r}; it has: {known}")


@dataclass(frozen=True)
class SelfTestRun:
    """The logits [T, V] of an entry for the self-test's tokens.

    `sha256` (hex): of the logits' bytes, row by row, little-endian, in the model's dtype. For each
    token: `rms`, the root mean square of its logits; `tokens`, the ids with the largest logits; and
    `logits`, their logits. Numbers have six significant digits.
    """

    entry: str
    sha256: str
    rms: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]
    logits: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class SelfTestSpec:
    """The results of the compiling machine for some tokens: `prompt` by the entry `prefill`, then
    the tokens of `block` by `sparse`, one after another, then all of `block` by `full`.
    """

    prompt: tuple[int, ...]
    block: tuple[int, ...]
    runs: tuple[SelfTestRun, ...]


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: the format version, the program's spec, a record of every other file, and
    the compiling machine's self-test, if there is one.
    """

    format_version: tuple[int, int]
    program: ProgramSpec
    files: dict[str, FileRecord]
    self_test: SelfTestSpec | None = None


def to_json(value: Any) -> JSON:
    """Converts dataclasses, enums, tuples and dicts to JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return value


def from_json(cls: type[_T], value: JSON, where: str = "manifest") -> _T:
    """Builds `cls` from JSON values; ignores unknown fields, which a newer minor version may have.

    Raises ArtifactError, naming the field, where a value is missing or has the wrong type.
    """
    return typing.cast(_T, _decode(cls, value, where))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a class's fields; cached, because finding them is slower than decoding."""
    return typing.get_type_hints(cls)


def _decode(hint: Any, value: JSON, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ArtifactError(f"{where}: an object is expected, found {type(value).__name__}")
        hints = _hints(hint)
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(hint):
            if field.name in value:
                name = f"{where}.{field.name}"
                fields[field.name] = _decode(hints[field.name], value[field.name], name)
            elif field.default is dataclasses.MISSING:
                raise ArtifactError(f"{where}.{field.name} is missing")
        return hint(**fields)
    if origin is tuple:
        if not isinstance(value, list):
            raise ArtifactError(f"{where}: a list is expected, found {type(value).__name__}")
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise ArtifactError(f"{where}: {len(args)} values are expected, found {len(value)}")
        hints_of = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(
            _decode(h, v, f"{where}[{i}]")
            for i, (h, v) in enumerate(zip(hints_of, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise ArtifactError(f"{where}: an object is expected, found {type(value).__name__}")
        return {k: _decode(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _decode(option, value, where)
            except ArtifactError:
                continue
        raise ArtifactError(f"{where}: {shown(value)} is not one of {hint}")
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        if value not in list(hint):
            raise ArtifactError(f"{where}: {shown(value)} is not one of {', '.join(hint)}")
        return hint(value)
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ArtifactError(f"{where}: an integer too large for a float") from None
    if type(value) is not hint:
        expected = "null" if hint is types.NoneType else getattr(hint, "__name__", hint)
        raise ArtifactError(f"{where}: {expected} is expected, found {shown(value)}")
    if hint is int and not -_INT64 <= value < _INT64:
        raise ArtifactError(f"{where}: an integer of 64 bits is expected, found {shown(value)}")
    if hint is float and not math.isfinite(value):
        raise ArtifactError(f"{where}: a finite number is expected, found {value}")
    return value
