"""What an artifact says of itself: frozen dataclasses, and their one way to and from JSON.

The compiler fills these in, the artifact's `manifest.json` holds them, the runtime reads them.
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

from sirius_runtime.errors import ArtifactError
from sirius_runtime.logits_options import GenerationSpec
from sirius_runtime.rules import RuleOptions

FORMAT_VERSION = (1, 1)
"""Major: readers refuse those that they do not know. Minor: additions that old readers ignore
(docs/format.md says what each added).
"""
NESTED_FORMAT_VERSION = (3, 0)
"""Of an artifact that holds nested weights; others stay readable for older readers."""
KNOWN_MAJORS = (FORMAT_VERSION[0], NESTED_FORMAT_VERSION[0])

JSON = Any  # None, bool, int, float, str, list[JSON], dict[str, JSON]
_T = TypeVar("_T")
_INT64 = 2**63
_SHOWN = 80  # characters of a wrong value, in a message


class Method(StrEnum):
    """How the sparse path chooses what it reads (see the `sparsify_*` passes). All that other code
    has to know of a method is a property here.
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
        """Whether neurons are chosen from the prompt: the state then holds `neurons`."""
        return self in (Method.GRIFFIN, Method.GRIFFIN_TEAL)

    @property
    def has_thresholds(self) -> bool:
        """Whether calibration chooses what a token keeps; how much that is varies."""
        return self in (Method.CATS, Method.TEAL, Method.GRIFFIN_TEAL)

    @property
    def skips_channels(self) -> bool:
        """Whether linears skip input channels."""
        return self in (Method.TEAL, Method.GRIFFIN_TEAL)

    @property
    def rewrites_mlps(self) -> bool:
        """Whether it skips neurons or experts: MLPs are then recognised first."""
        return self not in (Method.TEAL, Method.NONE)

    @property
    def for_dense_models(self) -> bool:
        """Whether it makes models without mixtures of experts sparse."""
        return self not in (Method.EXPERTS, Method.NONE)

    @property
    def for_mixtures(self) -> bool:
        """Whether it makes models with mixtures of experts sparse."""
        return self in (Method.TOPK, Method.EXPERTS)


class DType(StrEnum):
    """Floating point types that weights and activations may have."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Layout(StrEnum):
    """What a stored row of a nested weight is (see `sirius_runtime.nested`)."""

    BY_OUTPUTS = "outputs"
    BY_INPUTS = "inputs"


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of an entry. `dtype` is a torch dtype name, or ``model`` for the program's
    own.
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

    `shape` and `dtype` are those of the stored bytes. `transposed`: the checkpoint's tensor was
    stored transposed, in the layout that kernels stream. `retype`: follows the dtype asked for at
    load (rotary frequencies do not, nor do weights that a 16-bit model keeps in float32).
    `parameter`: one of the model's, in a floating point dtype; not a constant. `nested`: the layout
    of a nested weight, whose bytes hold both planes.
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
        """How many numbers the tensor holds."""
        stored = math.prod(self.shape)
        # Of 17 bytes, the planes give 16 to the nibbles of 16 numbers.
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
    """A place where a sparse step skips: the neurons of an MLP, the input channels of a linear, or
    a token's experts.

    `weight`: the (first) weight whose rows or columns are skipped; `units`: neurons, channels or
    experts there are, of a mixture those that a token is routed to; `kept`: how many a step keeps,
    a mean expected from calibration where `threshold` is given; `params`: the bytes of weights that
    one skipped unit saves a sparse step (in older artifacts its parameters: only shares of `step`
    matter). `counted`: the step counts what it keeps, in the output `kept`,
    because tokens differ.
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
    """The sparse path: `keep` is the share of neurons or channels asked for.

    `sites`: where it skips, in the graph's order. `dense_layers`: those that skip nothing. `step`:
    bytes of weights that a full step over one token reads, which is all of them but the experts
    that a token is not routed to. `density`: share of these that a sparse step reads, embeddings
    and lm_head counted. `draft_bits`: of nested weights, as it reads them; None where none is.
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
        """The sites that a step counts, in the order of its output `kept`."""
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
    """Defaults of the period: `period` tokens (K) in trees of `tree_width` (w), what its rules ask
    for, the `confidence` that a draft needs to go on, and the periods after which `griffin` selects
    its neurons again (`refresh`; 0: never).

    `period` and `tree_width` are also the static shapes of the entry `period`, and `rules` are
    those that it knows, in the order of its input `rule`.
    """

    period: int = 16
    tree_width: int = 1
    confidence: float = 0.0
    refresh: int = 0
    rules: tuple[str, ...] = ("sirius", "exact", "sample")


@dataclass(frozen=True)
class DraftingSpec:
    """What periods of `period` tokens whose drafts stop below `confidence` came to: `aal`, the
    tokens that one advances; `steps`, the sparse steps that it takes; `effective_density`, both
    means over drafts.
    """

    period: int
    confidence: float
    aal: float
    steps: float
    effective_density: float


@dataclass(frozen=True)
class AcceptanceSpec:
    """How far the sparse path's drafts got on held-out text, as the compiler measured it: `drafts`
    of `texts`, judged with this `threshold` and `verify_temperature`, teacher-forced.

    `density`: of the sparse steps. `agreement`: share of tokens that were the full path's own.
    `accepted`: share of drafts whose first 1, 2, … tokens pass. `periods`: by the period's size,
    without confidence. `best`: with the fewest reads a token, of all periods and confidences.
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
        """Share of drafted tokens that pass, of those whose predecessors in the draft did."""
        return sum(self.accepted) / (1.0 + sum(self.accepted[:-1]))


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
    """What one pass did: its rewrites, its time, and how the number of nodes changed.

    `seconds` is 0 in a file: equal inputs give equal bytes. Readers of version 1.0 need the field.
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
    """Everything that the runtime needs to know of a program besides its graphs and weights."""

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

    @property
    def nested(self) -> bool:
        """Whether any weight is nested."""
        return any(weight.nested is not None for weight in self.weights)

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of the model's parameters, where those that are not nested take `itemsize` each."""
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
    """The logits [T, V] that an entry gave of the self-test's tokens.

    `sha256` (hex): of their bytes, row by row, little-endian, in the model's dtype. Of each token
    `rms`, the root mean square of its logits; `tokens`, the ids of the likeliest; and `logits`,
    theirs. Numbers have six significant digits.
    """

    entry: str
    sha256: str
    rms: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]
    logits: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class SelfTestSpec:
    """What the compiling machine computed of some tokens: `prompt` by the entry `prefill`, then
    each token of `block` by `sparse`, one after another, then all of `block` by `full`.
    """

    prompt: tuple[int, ...]
    block: tuple[int, ...]
    runs: tuple[SelfTestRun, ...]


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`: format version, the program's spec, a record of every other file, and what
    the compiling machine computed, where it was asked.
    """

    format_version: tuple[int, int]
    program: ProgramSpec
    files: dict[str, FileRecord]
    self_test: SelfTestSpec | None = None


def to_json(value: Any) -> JSON:
    """Dataclasses, enums, tuples and dicts to plain JSON values."""
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
    """Builds `cls` from plain JSON values; unknown fields are ignored (a newer minor version).

    Raises ArtifactError naming the field where a value is missing or of the wrong type.
    """
    return typing.cast(_T, _decode(cls, value, where))


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """A class's fields and their types, which take longer to find than a value to decode."""
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
        raise ArtifactError(f"{where}: {_shown(value)} is not one of {hint}")
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        if value not in list(hint):
            raise ArtifactError(f"{where}: {_shown(value)} is not one of {', '.join(hint)}")
        return hint(value)
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ArtifactError(f"{where}: an integer of this size is no float") from None
    if type(value) is not hint:
        expected = "null" if hint is types.NoneType else getattr(hint, "__name__", hint)
        raise ArtifactError(f"{where}: {expected} is expected, found {_shown(value)}")
    if hint is int and not -_INT64 <= value < _INT64:
        raise ArtifactError(f"{where}: an integer of 64 bits is expected, found {_shown(value)}")
    if hint is float and not math.isfinite(value):
        raise ArtifactError(f"{where}: a finite number is expected, found {value}")
    return value


def _shown(value: JSON) -> str:
    """A value of any size, short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # of an integer of thousands of digits, of a deep list
        return f"a {type(value).__name__} that is too large"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
