"""The command line `sirius`: each command is a file here, and a line in `commands.COMMANDS`."""

from sirius_runtime.cli.commands import main

__all__ = ["main"]
