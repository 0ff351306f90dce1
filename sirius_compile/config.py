"""The options of a compilation: one frozen value, checked when it is created."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, TypeVar

from sirius_runtime.errors import ConfigError
from sirius_runtime.request import check_default_mode, check_ranges, check_tree
from sirius_runtime.rules import RuleOptions, check_options
from sirius_runtime.spec import DType, Method

AUTO: Literal["auto"] = "auto"
"""`--keep` or `--sparsity`: chosen by a search."""
BUILTIN = "builtin"
DEFAULT_KEEP = 0.5
DEFAULT_PERIOD = 16  # the paper's
DEFAULT_DRAFT_BITS = 4
_E = TypeVar("_E", bound=StrEnum)


class Graphs(StrEnum):
    """What an artifact's graphs are for."""

    ENTRIES = "entries"
    """The entries for PyTorch. The graph of a whole period takes half of the compile time."""
    TORCH = "torch"
    """The entries and a whole period for PyTorch."""
    ONNX = "onnx"
    """The entries and a whole period for ONNX Runtime."""
    BOTH = "both"

    @property
    def for_onnx(self) -> bool:
        return self in (Graphs.ONNX, Graphs.BOTH)

    @property
    def for_torch(self) -> bool:
        return self is not Graphs.ONNX

    @property
    def whole_periods(self) -> bool:
        return self is not Graphs.ENTRIES


class Weights(StrEnum):
    """How weights are stored."""

    DTYPE = "dtype"
    """As numbers of the program's dtype."""
    INT8 = "int8"
    """Nested: 8 bits a weight, and a draft may read only 4 (see `sirius_runtime.nested`)."""


@dataclass(frozen=True)
class DenseLayers:
    """Layers to keep dense: the layer numbers `fixed`, or the `auto` costliest layers."""

    fixed: tuple[int, ...] = ()
    auto: int = 0

    @classmethod
    def read(cls, value: DenseLayers | str | Sequence[int]) -> DenseLayers:
        """Reads ``0,31``, ``auto:2`` or a sequence of numbers; else raises ConfigError."""
        if isinstance(value, DenseLayers):
            return value
        if not isinstance(value, str):
            return cls(tuple(value))
        kind, _, count = value.partition(":")
        try:
            if kind.strip() == "auto":
                return cls(auto=int(count))
            return cls(tuple(int(part) for part in value.split(",") if part.strip()))
        except ValueError:
            raise ConfigError(
                f"--dense-layers takes layer numbers (0,31) or auto:N, got {value!r}"
            ) from None

    def check(self, layers: int) -> None:
        """Raises ConfigError if a number is not one of the model's `layers` layers, or if no layer
        would be left sparse.
        """
        if unknown := [layer for layer in self.fixed if not 0 <= layer < layers]:
            raise ConfigError(
                f"--dense-layers: the model has layers 0..{layers - 1}, got {unknown[0]}"
            )
        if not 0 <= max(self.auto, len(set(self.fixed))) < layers or self.auto < 0:
            raise ConfigError(
                f"--dense-layers must leave some of the {layers} layers sparse; use --sparsity "
                "none for a dense model"
            )


@dataclass(frozen=True)
class CompileConfig(RuleOptions):
    """Options of `compile_model`; the command line's flags have the same names.

    * sparsity: the method of the sparse path, or ``auto``.
    * keep: the share of neurons or channels that the sparse path keeps, by default 0.5, or
      ``auto``. With ``auto``, methods or shares are measured, and the one with the lowest effective
      density is taken. `measure` must be true.
    * agreement: with ``auto``, the least share of drafted tokens that must be the full path's
      argmax.
    * density: instead of `keep`, the share of the weights that a sparse step should read; the kept
      share is found by search.
    * dense_layers: layers to keep dense: their numbers, or ``auto:N`` for the N layers whose
      sparsity costs most agreement with the full path.
    * measure: measure the acceptance of drafts on held-out text, record it in the artifact, and set
      the period and the confidence to the best ones unless they are given. The command line does
      this by default.
    * period, tree_width: the static shapes of the graph `period`. The period is 16 if it is neither
      given nor measured.
    * mode, threshold, verify_temperature, confidence, refresh: with period and tree_width, the
      artifact's defaults for drafting and acceptance. A run can change them.
    * max_seq_len: the longest sequence, in tokens; by default the model's own.
    * dtype: the dtype of stored weights and of the computation; by default the checkpoint's.
    * weights: ``int8`` stores the weights of linears, MLPs and embeddings nested, in 8 bits.
    * draft_bits: the bits of a nested weight that the sparse path reads, 4 (the default) or 8.
    * graphs: see `Graphs`. With ``onnx`` or ``both``, weights are float32 or float16; the default
      is float32 if the checkpoint's dtype is neither.
    * adapter: the folder of an adapter (LoRA, …) to merge into the model.
    * base: if the model is an adapter itself, the model to merge it into; by default the model that
      the adapter names.
    * device: the device that calibration runs on.
    * calibration: a text or JSONL file, or ``builtin``.
    * revision, cache_dir, trust_remote_code: as for transformers' ``from_pretrained``.

    Raises ConfigError for a value out of its range, with the range.
    """

    sparsity: Method | str = Method.CATS
    keep: float | Literal["auto"] | None = None
    density: float | None = None
    agreement: float | None = None
    dense_layers: DenseLayers | str | Sequence[int] = ()
    measure: bool = False
    mode: str = "sirius"
    period: int | None = None
    tree_width: int = 1
    confidence: float | None = None
    refresh: int = 0
    max_seq_len: int | None = None
    dtype: DType | str | None = None
    weights: Weights | str = Weights.DTYPE
    draft_bits: int | None = None
    device: str = "cpu"
    calibration: str | Path = BUILTIN
    revision: str | None = None
    cache_dir: Path | None = None
    trust_remote_code: bool = False
    adapter: Path | None = None
    base: str | None = None
    graphs: Graphs | str = Graphs.TORCH

    def __post_init__(self) -> None:
        # Python callers may pass names as strings, like the command line.
        if self.sparsity != AUTO:
            object.__setattr__(self, "sparsity", _member(Method, self.sparsity, "--sparsity"))
        object.__setattr__(self, "graphs", _member(Graphs, self.graphs, "--graphs"))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", _member(DType, self.dtype, "--dtype"))
        object.__setattr__(self, "weights", _member(Weights, self.weights, "--weights"))
        self._check_nesting()
        object.__setattr__(self, "dense_layers", DenseLayers.read(self.dense_layers))
        if self.keep is not None and self.density is not None:
            raise ConfigError("--keep and --density set the same thing. Give one of them")
        for value, flag in (
            (self.keep, "--keep"),
            (self.density, "--density"),
            (self.agreement, "--agreement"),
        ):
            if value is None or (value == AUTO and flag == "--keep"):
                continue
            if isinstance(value, str) or not 0.0 < value <= 1.0:
                raise ConfigError(f"{flag} must be in (0, 1], got {value}")
        self._check_search()
        check_tree(self.given_period, self.tree_width, max(self.tree_width, 1), flag="--")
        check_ranges(self.confidence or 0.0, self.refresh, flag="--")
        check_default_mode(self.mode, flag="--")
        if self.refresh and self.sparsity != AUTO and not Method(self.sparsity).per_prompt:
            raise ConfigError(
                f"--refresh applies to griffin; --sparsity {self.sparsity} has no neurons that are "
                "selected once per prompt. Leave --refresh out"
            )
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"--threshold must be in [0, 1], got {self.threshold}")
        check_options(self, flags=True)
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise ConfigError(f"--max-seq-len must be at least 2, got {self.max_seq_len}")

    def _check_nesting(self) -> None:
        bits = self.draft_bits
        if bits is not None and self.weights != Weights.INT8:
            raise ConfigError(
                f"--draft-bits {bits} applies to nested weights only: add --weights int8, or leave "
                "--draft-bits out"
            )
        if bits not in (None, 4, 8):
            raise ConfigError(f"--draft-bits must be 4 or 8, got {bits}")
        if self.sparsity == AUTO:
            return
        method = Method(self.sparsity)
        if self.weights == Weights.INT8 and Graphs(self.graphs).for_onnx and method.per_prompt:
            raise ConfigError(
                f"--graphs {self.graphs}: the operators of --weights int8 with --sparsity {method} "
                "have no ONNX translation. Use --graphs torch or entries, another --sparsity, or "
                "leave --weights out"
            )

    def _check_search(self) -> None:
        if not self.searches:
            if self.agreement is not None:
                raise ConfigError(
                    f"--agreement {self.agreement:g} applies to a search: add --keep auto or "
                    "--sparsity auto, or leave --agreement out"
                )
            return
        flag = "--sparsity auto" if self.sparsity == AUTO else "--keep auto"
        if self.sparsity == Method.NONE:
            raise ConfigError(
                "--keep auto searches for the share that a sparse path keeps, and --sparsity none "
                "keeps everything. Leave --keep out, or give another --sparsity"
            )
        if self.density is not None:
            raise ConfigError(f"{flag} and --density both choose the kept share. Give one of them")
        if not self.measure:
            raise ConfigError(
                f"{flag} compares measured drafts: leave --no-measure out (in Python, give "
                "measure=True)"
            )
        if DenseLayers.read(self.dense_layers).auto:
            raise ConfigError(
                f"{flag} can't be combined with --dense-layers auto:N, which ranks the layers of "
                "one method at one share. Give the layers' numbers, or search first"
            )

    @property
    def searches(self) -> bool:
        """Whether the method or the kept share is chosen by a search."""
        return AUTO in (self.sparsity, self.keep)

    @property
    def nested_bits(self) -> int | None:
        """Bits of a nested weight that a draft reads; None if weights are not nested."""
        if self.weights != Weights.INT8:
            return None
        return DEFAULT_DRAFT_BITS if self.draft_bits is None else self.draft_bits

    @property
    def drafts(self) -> bool:
        """Whether the sparse path reads fewer bytes than the full path."""
        bits = self.nested_bits
        return self.sparsity != Method.NONE or (bits is not None and bits < 8)

    @property
    def given_period(self) -> int:
        """The period given, or the default, which a measured period replaces."""
        return DEFAULT_PERIOD if self.period is None else self.period


def _member(kind: type[_E], value: str, flag: str) -> _E:
    if value not in list(kind):
        raise ConfigError(f"{flag} must be one of {', '.join(kind)}, got {value!r}")
    return kind(value)
