"""Writes an artifact again with other defaults: everything else is copied byte for byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from sirius_runtime.artifact import Artifact
from sirius_runtime.artifact_writer import ArtifactWriter
from sirius_runtime.entries import PERIOD
from sirius_runtime.errors import ConfigError
from sirius_runtime.manifest_check import check_program
from sirius_runtime.onnx_files import PROGRAM
from sirius_runtime.spec import PeriodSpec, to_json


def write_defaults(
    path: str | Path, out: str | Path, period: PeriodSpec, *, force: bool = False
) -> Path:
    """Writes the artifact at `path` to `out`, with `period` as the defaults of its runs.

    The entries are copied from the mapped file, weights never as a whole in memory; `out` may be
    `path`. The file appears under a temporary name and is renamed. force: replace an existing file.
    Raises ConfigError for sizes that the graph of a whole period was not compiled for, and
    ArtifactError for values out of range and for entries that differ from their hashes.
    """
    with Artifact.open(path, verify=False) as artifact:
        program, own = artifact.program, artifact.program.period
        sizes = (period.period, period.tree_width, period.rules)
        compiled = any(entry.name == PERIOD for entry in program.entries)
        if compiled and sizes != (own.period, own.tree_width, own.rules):
            raise ConfigError(
                f"{path} has the graph of a whole period, which was compiled for period "
                f"{own.period} and width {own.tree_width}: keep them, or compile it with --graphs "
                "entries"
            )
        program = replace(program, period=period)
        check_program(program)
        changed = {}
        if artifact.names(PROGRAM):
            document = artifact.read_json(PROGRAM) | {"period": to_json(period)}
            changed[PROGRAM] = json.dumps(document).encode()
        with ArtifactWriter(out, force=force) as writer:
            writer.add_copies(artifact, changed)
            artifact.check_unchanged()
            writer.finish(program, lambda _: artifact.manifest.self_test)
    return Path(out)
