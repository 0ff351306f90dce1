"""Adds ONNX graphs to an artifact that has none, from its graph documents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sirius_compile.onnx.package import onnx_files
from sirius_runtime.artifact import MANIFEST, WEIGHTS, Artifact
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import ConfigError
from sirius_runtime.onnx_files import FOLDER
from sirius_runtime.spec import DType, ProgramSpec, WeightSpec


def add_onnx(
    path: str | Path, out: str | Path, *, dtype: DType | str | None = None, force: bool = False
) -> Path:
    """Writes the artifact at `path`, with ONNX graphs, to `out`.

    `dtype`: the dtype to convert weights to, by default the stored one. `force`: replace an
    existing file. Raises ConfigError if the dtype is neither float32 nor float16, or if `out`
    exists.
    """
    if dtype is not None and dtype not in list(DType):
        raise ConfigError(f"--dtype must be one of {', '.join(DType)}, got {dtype!r}")
    with Artifact.open(path) as artifact, ArtifactWriter(out, force=force) as writer:
        program = _converted(artifact.program, DType(dtype or artifact.program.model.dtype))
        files = onnx_files(program, lambda name: artifact.read_json(f"graphs/{name}.json"))
        tensors = artifact.weights()

        def stored(spec: WeightSpec) -> Tensor:
            return tensors[spec.name].to(dtype_of(spec.dtype))

        for name in artifact.names():
            if name != MANIFEST and not name.startswith((WEIGHTS, FOLDER)):
                writer.add_bytes(name, artifact.read_bytes(name))
        for name, content in files.items():
            writer.add_bytes(name, content)
        writer.add_weights(program.weights, stored)
        artifact.check_unchanged()
        same = program.model.dtype == artifact.program.model.dtype
        writer.finish(program, lambda _: artifact.manifest.self_test if same else None)
    return Path(out)


def _converted(program: ProgramSpec, dtype: DType) -> ProgramSpec:
    weights = tuple(replace(w, dtype=str(dtype)) if w.retype else w for w in program.weights)
    return replace(program, model=replace(program.model, dtype=dtype), weights=weights)
