"""The closing summary of a compilation, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from sirius_compile.compile import Compiled
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.spec import JSON, to_json


@dataclass(frozen=True)
class Summary:
    """What a compilation made. Sizes in bytes; `seconds` of the whole, passes each with its own."""

    artifact: Path
    compiled: Compiled
    artifact_bytes: int
    dense_bytes: int
    seconds: float

    def to_json(self) -> JSON:
        """The summary as plain values (`--json`)."""
        spec, calibration = self.compiled.spec, self.compiled.calibration
        return {
            "artifact": str(self.artifact),
            "model": to_json(spec.model),
            "sparsity": to_json(spec.sparsity),
            "period": to_json(spec.period),
            "calibration": None if calibration is None else to_json(calibration),
            "passes": to_json(spec.passes),
            "artifact_bytes": self.artifact_bytes,
            "dense_bytes": self.dense_bytes,
            "seconds": self.seconds,
        }

    def table(self) -> Table:
        """The summary for a reader."""
        spec, calibration = self.compiled.spec, self.compiled.calibration
        model, sparsity = spec.model, spec.sparsity
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column()
        table.add_row("model", f"{model.source} ({model.model_type}), {model.dtype}")
        table.add_row("parameters", f"{model.parameters:,}")
        sparse = len({site.layer for site in sparsity.sites})
        table.add_row("sparse layers", f"{sparse} of {spec.state.layers}")
        table.add_row("sparse path", f"{sparsity.method}, {sparsity.keep:.0%} of the neurons kept")
        table.add_row("density", f"{sparsity.density:.3f} of the weights read by a sparse step")
        if calibration is not None:
            table.add_row(
                "calibration",
                f"{calibration.tokens:,} tokens; kept {min(calibration.reached):.1%} to "
                f"{max(calibration.reached):.1%} of the neurons on them",
            )
        ratio = self.artifact_bytes / self.dense_bytes
        table.add_row(
            "artifact",
            f"{self.artifact}, {self.artifact_bytes:,} bytes, {ratio:.3f} x the dense weights",
        )
        passes = ", ".join(f"{p.name} {p.seconds * 1e3:.0f} ms" for p in spec.passes)
        table.add_row("passes", passes)
        table.add_row("time", f"{self.seconds:.1f} s")
        return table


def summarise(compiled: Compiled, artifact: Path, seconds: float) -> Summary:
    """The summary of a compilation that was saved to `artifact`."""
    spec = compiled.spec
    return Summary(
        artifact=artifact,
        compiled=compiled,
        artifact_bytes=artifact.stat().st_size,
        dense_bytes=spec.model.parameters * dtype_of(spec.model.dtype).itemsize,
        seconds=seconds,
    )
