"""The closing summary of a compilation, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.table import Table
from rich.text import Text

from sirius_compile.calibration import Calibration
from sirius_compile.onnx.package import onnx_summary
from sirius_compile.product import Compiled
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.safetensors_file import share_of_bfloat16
from sirius_runtime.spec import JSON, AcceptanceSpec, DraftingSpec, to_json
from sirius_runtime.terminal import plain

SHOWN = (2, 4, 8, 12, 16)
"""The measured periods that the table shows."""


@dataclass(frozen=True)
class Summary:
    """The summary of a compilation.

    `artifact_bytes`: the file's size. `dense_bytes`: the size of the dense weights in the model's
    dtype. `seconds`: the time of the whole compilation.
    """

    artifact: Path
    compiled: Compiled
    artifact_bytes: int
    dense_bytes: int
    seconds: float

    def to_json(self) -> JSON:
        """The summary as plain values (`--json`)."""
        spec, sparse = self.compiled.spec, self.compiled.sparse
        calibration = sparse and sparse.calibration
        return {
            "artifact": str(self.artifact),
            "model": to_json(spec.model),
            "sparsity": to_json(spec.sparsity),
            "period": to_json(spec.period),
            "calibration": None if calibration is None else to_json(calibration),
            "ranking": to_json(sparse.ranking if sparse else ()),
            "acceptance": to_json(spec.acceptance),
            "search": to_json(spec.search),
            "passes": to_json(spec.passes),
            "artifact_bytes": self.artifact_bytes,
            "dense_bytes": self.dense_bytes,
            "seconds": self.seconds,
            "warnings": list(self.compiled.warnings),
        }

    def table(self) -> Table:
        """The summary as a table."""
        spec, sparse = self.compiled.spec, self.compiled.sparse
        model, sparsity = spec.model, spec.sparsity
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column()
        named = plain(f"{model.source} ({model.model_type}), {model.dtype}")
        table.add_row("model", Text(named))  # Text: brackets in a name are not markup
        table.add_row("parameters", f"{model.parameters:,}")
        layers = len({site.layer for site in sparsity.sites})
        table.add_row("sparse layers", f"{layers} of {spec.state.layers}")
        table.add_row("sparse path", f"{sparsity.method}, keep {sparsity.keep:.1%}")
        share = f"a sparse step reads {sparsity.density:.3f} of the full path's bytes"
        if spec.nested:
            nested = [weight for weight in spec.weights if weight.nested]
            table.add_row(
                "weights",
                f"{len(nested)} matrices nested in 8 bits; drafts read {sparsity.draft_bits} bits",
            )
            full = share_of_bfloat16(spec)
            share += (
                f"; with bfloat16 weights as 1, the full path reads {full:.3f} and a sparse step "
                f"{sparsity.density * full:.3f}"
            )
        table.add_row("density", share)
        if sparse is not None and sparse.ranking:
            costs = ", ".join(f"{r.layer} ({1.0 - r.agreement:.2%})" for r in sparse.ranking)
            table.add_row("layer costs", f"agreement lost if only this layer is sparse: {costs}")
        if sparse is not None and sparse.calibration is not None:
            for row in _calibration_rows(sparse.calibration):
                table.add_row(*row)
        if spec.acceptance is not None:
            for row in _acceptance_rows(spec.acceptance):
                table.add_row(*row)
        ratio = self.artifact_bytes / self.dense_bytes
        table.add_row(
            "artifact",
            f"{self.artifact}, {self.artifact_bytes:,} bytes, {ratio:.3f} x the dense weights",
        )
        if self.compiled.graphs.for_onnx:
            table.add_row("onnx", onnx_summary(spec))
        passes = ", ".join(f"{p.name} {p.seconds * 1e3:.0f} ms" for p in spec.passes)
        table.add_row("passes", passes)
        table.add_row("time", f"{self.seconds:.1f} s")
        return table


def _acceptance_rows(acceptance: AcceptanceSpec) -> Iterator[tuple[str, str]]:
    """The drafts measured on held-out text: AAL and effective density by period, and the best."""
    yield (
        "drafts",
        f"{acceptance.drafts} on {acceptance.texts} held-out texts, at density "
        f"{acceptance.density:.3f} of the full path's bytes; {acceptance.agreement:.1%} of tokens "
        "agree with the full path",
    )
    for one in acceptance.periods:
        if one.period in SHOWN or one is acceptance.periods[-1]:
            yield "", f"period {one.period:2}: AAL {one.aal:5.2f}, {_reads(one)}"
    best = acceptance.best
    sure = f", confidence {best.confidence:g}" if best.confidence else ""
    yield "best", f"period {best.period}{sure}: AAL {best.aal:.2f}, {_reads(best)}"


def _reads(one: DraftingSpec) -> str:
    return f"effective density {one.effective_density:.3f}"


def _calibration_rows(calibration: Calibration) -> Iterator[tuple[str, str]]:
    """The tokens read; then for each layer the share that its thresholds keep and the target, both
    averaged over the layer's sites.
    """
    yield (
        "calibration",
        f"{calibration.tokens:,} tokens; share kept on {calibration.held_out:,} held-out tokens "
        "(target in brackets)",
    )
    for layer in sorted({site.layer for site in calibration.sites}):
        sites = [site for site in calibration.sites if site.layer == layer]
        reached = fmean(site.reached for site in sites)
        target = fmean(site.target for site in sites)
        yield "", f"layer {layer}: {reached:.1%} ({target:.1%})"


def summarise(compiled: Compiled, artifact: Path, seconds: float) -> Summary:
    """Summarises a compilation that was saved to `artifact` and took `seconds`."""
    spec = compiled.spec
    return Summary(
        artifact=artifact,
        compiled=compiled,
        artifact_bytes=artifact.stat().st_size,
        dense_bytes=spec.weight_bytes(dtype_of(spec.model.dtype).itemsize),
        seconds=seconds,
    )
