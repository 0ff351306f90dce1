"""The command line `sirius-compile`: each command is a file here, and a line in
`commands.COMMANDS`.
"""

from sirius_compile.cli.commands import main

__all__ = ["main"]
