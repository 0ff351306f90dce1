"""`sirius export-onnx`: an artifact's ONNX graphs as files in a folder."""

from __future__ import annotations

import argparse

from sirius_runtime.cli.command import Command
from sirius_runtime.command_line import path_argument, say


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=path_argument, metavar="MODEL.sirius")
    parser.add_argument("folder", type=path_argument, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="write into a folder with files")


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.onnx_files import export_onnx

    for path in export_onnx(args.artifact, args.folder, force=args.force):
        say(f"{path}  {path.stat().st_size:,} bytes")


COMMAND = Command("write an artifact's ONNX graphs to a folder", _add_arguments, _run)
