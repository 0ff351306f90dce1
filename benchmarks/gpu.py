"""All GPU checks and benchmarks, in one command of at most eight minutes.

    make gpu

Runs each part with its own time limit, even if others failed: a check of operators and tokens on
the GPU; the kernels; whole steps at the shapes of Llama-3-8B and Llama-3-70B; recorded periods. The
output of each goes to a file `gpu-*.md` in the folder `--out`, with the machine, the versions and
the commit. The exit code is 1 if a part failed or is missing.

`--smoke --device cpu` tests the command on the CPU at tiny shapes, without the kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from benchmarks.parts import RESULTS, Part, choose, run_all
from sirius_runtime.command_line import finish, folder_argument


def parts(device: str, smoke: bool) -> list[Part]:
    """In the order in which they run: what matters most comes first."""
    on = ("--device", device)
    if smoke:
        small = (*on, "--shape", "tiny", "--context", "16", "--rounds", "2")
        steps = (*small, "--skipped", "0.5", "--verify", "4")
        periods = (*small, "--period", "4", "--width", "1")
        return [
            Part("check", "Right on the device", "gpu_check", (*on, "--smoke"), 120),
            Part("steps-tiny", "Steps", "steps", steps, 120),
            Part("periods-tiny", "Recorded periods", "periods", periods, 120),
        ]
    large = (*on, "--context", "1024", "--verify", "4", "8", "16", "31", "61")
    eight, seventy = "Llama-3-8B's shapes", "Llama-3-70B's shapes, four layers"

    def steps_of(name: str, title: str, seconds: int, *more: str) -> Part:
        # It prints at its end, which must come before it is stopped.
        soon = ("--seconds", str(seconds - 30))
        return Part(name, title, "steps", (*large, *soon, *more), seconds)

    return [
        Part("check", "Right on the device", "gpu_check", on, 135),
        Part("kernels", "Kernels", "gpu_kernels", (), 90),
        Part("kernels-nested", "Kernels of nested weights", "gpu_kernels", ("--nested",), 55),
        steps_of(
            *("steps-8b", f"Steps at {eight}", 80),
            *("--shape", "8b", "--skipped", "0.5", "0.3", "0.65"),
        ),
        steps_of("steps-70b", f"Steps at {seventy}", 45, "--shape", "70b"),
        Part(
            "periods-8b",
            f"Recorded periods at {eight}",
            "periods",
            (*on, "--shape", "8b", "--context", "1024", "--rounds", "7"),
            35,
        ),
        steps_of(
            *("steps-70b-compiled", f"Steps at {seventy}, compiled by inductor", 40),
            *("--shape", "70b", "--compiled", "--skipped", "0.5"),
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=folder_argument, default=RESULTS)
    parser.add_argument("--only", nargs="+", metavar="PART", help="check, kernels, steps-8b, …")
    parser.add_argument("--commit", help="where this is no git checkout")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA GPU here; see --smoke --device cpu", file=sys.stderr)
        return 2
    try:
        chosen = choose(parts(args.device, args.smoke), args.only)
    except ValueError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 1 if run_all(chosen, args.device, args.out, "gpu", args.commit) else 0


if __name__ == "__main__":
    sys.exit(finish("benchmarks.gpu", main))
