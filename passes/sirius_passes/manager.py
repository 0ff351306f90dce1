"""Runs a list of passes: checks the stage before each, verifies its output, times it, and dumps the
graphs on request.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

from sirius_passes.printer import print_graph
from sirius_passes.program import Program, Stage
from sirius_passes.verifier import verify
from sirius_runtime.errors import PassError
from sirius_runtime.new_file import write_file
from sirius_runtime.spec import PassRecord


class Pass(ABC):
    """One rewrite of a program. It needs a program at stage `takes` and leaves it at `gives`.

    Run again on its own output, a pass makes no rewrite: it returns 0, or raises
    UnsupportedModelError if it requires a match and none is left.
    """

    name: ClassVar[str]
    takes: ClassVar[Stage]
    gives: ClassVar[Stage]

    @abstractmethod
    def run(self, program: Program) -> int:
        """Rewrites `program` in place and returns the number of rewrites made.

        Raises UnsupportedModelError if it requires a match and finds none: the message says what
        was looked for and the nearest miss.
        """


def run_passes(
    program: Program,
    passes: Iterable[Pass],
    *,
    dump: Path | None = None,
    first: int = 0,
    progress: Callable[[PassRecord], None] = lambda record: None,
) -> tuple[PassRecord, ...]:
    """Runs `passes` in order over `program`, in place; returns one record a pass.

    With `dump`, the graphs before the first pass and after each one are written to that folder, one
    text file a graph, numbered from `first` (the number of passes that ran before this list).
    Raises PassError if the program is not at the stage that a pass takes, or if a pass breaks an
    invariant.
    """
    records = []
    if dump is not None and first == 0:
        dump_graphs(program, dump, 0, "capture")
    for index, step in enumerate(passes, start=first + 1):
        if program.stage is not step.takes:
            raise PassError(
                f"pass {step.name} takes stage {step.takes.name}, "
                f"but the program is at {program.stage.name}: the order of passes is wrong"
            )
        before, start = program.nodes(), time.perf_counter()
        rewrites = step.run(program)
        program.stage = step.gives
        program.drop_unused_weights()
        seconds = time.perf_counter() - start
        verify(program, after=step.name)
        record = PassRecord(step.name, rewrites, seconds, before, program.nodes())
        records.append(record)
        progress(record)
        if dump is not None:
            dump_graphs(program, dump, index, step.name)
    return tuple(records)


def dump_graphs(program: Program, folder: Path, index: int, name: str) -> None:
    """Writes each graph of `program` to ``folder/<index>_<name>.<graph>.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    for graph_name, module in program.graphs.items():
        path = folder / f"{index:02d}_{name}.{graph_name}.txt"
        write_file(path, print_graph(module).encode())
