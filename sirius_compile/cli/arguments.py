"""Argument parsers that several commands share, for typer."""

from __future__ import annotations

from pathlib import Path

import typer

from sirius_runtime.command_line import read_path
from sirius_runtime.errors import ConfigError


def path(text: str) -> Path:
    """`read_path` for typer."""
    try:
        return read_path(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
