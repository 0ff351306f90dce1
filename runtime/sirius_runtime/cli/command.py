"""The type of a `sirius` command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command: `help` is its line in ``sirius --help``, `epilog` is printed below its options.

    `add_arguments` declares its arguments. `run` takes the parsed arguments, calls a function that
    a Python user can call too, and prints the result.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    epilog: str | None = None
