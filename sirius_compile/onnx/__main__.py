"""`python -m sirius_compile.onnx model.sirius --out with-onnx.sirius`: see `add`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sirius_runtime.errors import SiriusError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code (2: the user's to mend, 70: a bug)."""
    from sirius_compile.onnx.add import add_onnx

    parser = argparse.ArgumentParser(
        prog="python -m sirius_compile.onnx", description="Add ONNX graphs to an artifact."
    )
    parser.add_argument("artifact", type=Path, metavar="MODEL.sirius")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the artifact to write")
    parser.add_argument("--dtype", help="float32 or float16 (default: as stored)")
    parser.add_argument("--force", action="store_true", help="replace an existing artifact")
    args = parser.parse_args(arguments)
    try:
        add_onnx(args.artifact, args.out, dtype=args.dtype, force=args.force)
    except SiriusError as error:
        sys.stderr.write(f"sirius-compile: error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
