"""`sirius-compile onnx`: adds ONNX graphs to an artifact that has none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sirius_compile.cli.arguments import path


def add_onnx_graphs(
    artifact: Annotated[
        Path, typer.Argument(parser=path, metavar="MODEL.sirius", help="The artifact to read.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", parser=path, help="The artifact to write.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32 or float16. Default: as stored.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing artifact.")] = False,
) -> None:
    """Add ONNX graphs to an artifact."""
    from sirius_compile.onnx.add import add_onnx

    add_onnx(artifact, out, dtype=dtype, force=force)
