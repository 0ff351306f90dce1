"""All CPU benchmarks, in one command of at most twenty minutes.

    make bench

Runs each part with its own time limit, even if others failed: the kernels, compared with the
machine's read bandwidth; whole steps at Llama-3.2-1B's shapes, compared with transformers and, if
installed, llama.cpp; steps over nested weights at Qwen2.5-1.5B's shapes; whole answers of the
shipped model; time and memory of an artifact; and a period as one graph. The output of each goes to
a file `cpu-*.md` in the folder `--out`, with the machine, the versions and the commit. The exit
code is 1 if a part failed.

Nothing else should run meanwhile, as it would take memory bandwidth from the timed code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.parts import RESULTS, Part, choose, run_all
from sirius_runtime.command_line import finish, folder_argument

PASSIVE = {"OMP_WAIT_POLICY": "passive"}  # as `sirius run` sets it


def parts(out: Path) -> list[Part]:
    """In the order in which they run."""
    plot = str(out / "cpu-advance.png")
    return [
        Part("kernels", "Kernels at Llama-3.2-1B's shapes", "kernels", ("--rounds", "5"), 180),
        Part(
            *("steps", "Steps at Llama-3.2-1B's shapes", "steps"),
            ("--rounds", "7", "--seconds", "210", "--plot", plot),
            270,
        ),
        Part(
            *("nested", "Steps over nested weights at Qwen2.5-1.5B's shapes", "nested"),
            ("--rounds", "9"),
            270,
            PASSIVE,
        ),
        Part("end-to-end", "Whole answers of tally-3m", "end_to_end", ("--problems", "6"), 150),
        Part("costs", "Costs of an artifact", "costs", ("--repeats", "3"), 150),
        Part(
            *("context", "A period as one graph", "context", ("--repeats", "15"), 150),
            PASSIVE,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=folder_argument, default=RESULTS)
    parser.add_argument("--only", nargs="+", metavar="PART", help="kernels, steps, costs, …")
    parser.add_argument("--commit", help="where this is no git checkout")
    args = parser.parse_args(arguments)
    try:
        chosen = choose(parts(args.out), args.only)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 1 if run_all(chosen, "cpu", args.out, "cpu", args.commit) else 0


if __name__ == "__main__":
    sys.exit(finish("benchmarks.cpu", main))
