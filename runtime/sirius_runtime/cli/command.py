"""What a command of `sirius` is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command: `help` is its line in ``sirius --help``, `epilog` stands below its options.

    `add_arguments` declares what it takes. `run` does it: it parses no further, calls a function
    that a Python user can call too, and prints.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    epilog: str | None = None
