"""What a compilation is asked for: one frozen value, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from sirius_runtime.errors import ConfigError
from sirius_runtime.request import check_ranges, check_tree
from sirius_runtime.spec import DType, Method

BUILTIN = "builtin"
_E = TypeVar("_E", bound=StrEnum)


@dataclass(frozen=True)
class CompileConfig:
    """Options of `compile_model`; the command line's flags under the same names.

    sparsity, keep: the sparse path and the share of neurons that it keeps. period, tree_width: of
    a draft, the static shapes of the graph `period`. They, threshold, verify_temperature,
    confidence and refresh are defaults that the artifact carries, which a run can change.
    max_seq_len: the longest sequence served, by default the model's own. dtype: of the stored
    weights, by default the checkpoint's. device: where calibration runs. calibration: a text or
    JSONL file, or ``builtin``.

    Raises ConfigError for a value out of its range, with the range.
    """

    sparsity: Method | str = Method.CATS
    keep: float = 0.5
    period: int = 16
    tree_width: int = 1
    threshold: float = 0.1
    verify_temperature: float = 0.6
    confidence: float = 0.0
    refresh: int = 0
    max_seq_len: int | None = None
    dtype: DType | str | None = None
    device: str = "cpu"
    calibration: str | Path = BUILTIN
    revision: str | None = None
    cache_dir: Path | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        # Names are taken from Python as from the command line.
        object.__setattr__(self, "sparsity", _member(Method, self.sparsity, "--sparsity"))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", _member(DType, self.dtype, "--dtype"))
        if not 0.0 < self.keep <= 1.0:
            raise ConfigError(f"--keep must be in (0, 1], got {self.keep}")
        check_tree(self.period, self.tree_width, max(self.tree_width, 1), flag="--")
        check_ranges(self.confidence, self.refresh, flag="--")
        if self.refresh and not Method(self.sparsity).per_prompt:
            raise ConfigError(
                f"--refresh chooses griffin's neurons anew; --sparsity {self.sparsity} chooses "
                "them for every token"
            )
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"--threshold must be in [0, 1], got {self.threshold}")
        if not 0.0 < self.verify_temperature < float("inf"):
            raise ConfigError(f"--verify-temperature must be > 0, got {self.verify_temperature}")
        if self.max_seq_len is not None and self.max_seq_len < 2:
            raise ConfigError(f"--max-seq-len must be at least 2, got {self.max_seq_len}")


def _member(kind: type[_E], value: str, flag: str) -> _E:
    if value not in list(kind):
        raise ConfigError(f"{flag} must be one of {', '.join(kind)}, got {value!r}")
    return kind(value)
