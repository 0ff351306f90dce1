"""What several commands read alike, for typer."""

from __future__ import annotations

from pathlib import Path

import typer

from sirius_runtime.command_line import read_path
from sirius_runtime.errors import ConfigError


def path(text: str) -> Path:
    """As `read_path`, of a command line's word."""
    try:
        return read_path(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
