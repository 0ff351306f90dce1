"""`python -m sirius_compile.onnx model.sirius --out with-onnx.sirius`: see `add`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sirius_runtime.command_line import finish, path_argument


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code, as `sirius_runtime.command_line` has it."""
    parser = argparse.ArgumentParser(
        prog="python -m sirius_compile.onnx", description="Add ONNX graphs to an artifact."
    )
    parser.add_argument("artifact", type=path_argument, metavar="MODEL.sirius")
    parser.add_argument(
        "-o", "--out", type=path_argument, required=True, help="the artifact to write"
    )
    parser.add_argument("--dtype", help="float32 or float16 (default: as stored)")
    parser.add_argument("--force", action="store_true", help="replace an existing artifact")

    def command() -> None:
        from sirius_compile.onnx.add import add_onnx

        args = parser.parse_args(arguments)
        add_onnx(args.artifact, args.out, dtype=args.dtype, force=args.force)

    return finish("sirius-compile", command)


if __name__ == "__main__":
    sys.exit(main())
