"""Everything that a GPU is asked, in one command of at most eight minutes.

    make gpu

Runs, each within its own time, and each whatever became of those before it: whether operators and
tokens are right on the GPU; the kernels; whole steps at the shapes of Llama-3-8B and Llama-3-70B;
recorded periods. What each prints goes to a file `gpu-*.md` in the folder `--out`, with the
machine, the versions and the commit. Exits with 1 where a part failed or is missing.

`--smoke --device cpu` runs the same at tiny shapes on the CPU, to see that it runs; the kernels are
a GPU's, and left out.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy")


@dataclass(frozen=True)
class Part:
    """A module of `benchmarks`, its arguments, and the seconds that it may take."""

    name: str
    title: str
    module: str
    arguments: tuple[str, ...]
    seconds: int

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.{self.module}", *self.arguments]


@dataclass(frozen=True)
class Result:
    """How a part ended: `said` is empty where it ran to its end."""

    part: Part
    printed: str
    seconds: float
    said: str


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
        Part("check", "Right on the device", "gpu_check", on, 130),
        Part("kernels", "Kernels", "gpu_kernels", (), 100),
        steps_of(
            *("steps-8b", f"Steps at {eight}", 120),
            *("--shape", "8b", "--skipped", "0.5", "0.3", "0.65"),
        ),
        steps_of("steps-70b", f"Steps at {seventy}", 50, "--shape", "70b"),
        Part(
            "periods-8b",
            f"Recorded periods at {eight}",
            "periods",
            (*on, "--shape", "8b", "--context", "1024", "--rounds", "7"),
            40,
        ),
        steps_of(
            *("steps-70b-compiled", f"Steps at {seventy}, compiled by inductor", 40),
            *("--shape", "70b", "--compiled", "--skipped", "0.5"),
        ),
    ]


def run(part: Part) -> Result:
    begin = time.perf_counter()

    def ended(printed: str | bytes | None, said: str) -> Result:
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed or ""
        return Result(part, text, time.perf_counter() - begin, said)

    if not (ROOT / "benchmarks" / f"{part.module}.py").exists():
        return ended("", f"missing: there is no benchmarks/{part.module}.py")
    try:
        done = subprocess.run(
            part.command, cwd=ROOT, capture_output=True, text=True, timeout=part.seconds
        )
    except subprocess.TimeoutExpired as error:
        return ended(error.stdout, f"stopped after its {part.seconds} seconds")
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-8:]
        return ended(done.stdout, "\n".join([f"exit code {done.returncode}", *lines]))
    return ended(done.stdout, "")


def machine(device: str, commit: str) -> str:
    """What it runs on, with the versions and the commit."""
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return f"{name}; Python {platform.python_version()}, {', '.join(found)}; commit {commit}"


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown (not a git checkout)"
    return done.stdout.strip()


def document(result: Result, where: str) -> str:
    part = result.part
    lines = [f"# {part.title}", "", where, ""]
    lines += [f"`python -m {' '.join(part.command[2:])}`, {result.seconds:.0f} s", ""]
    if result.said:
        lines += ["```", result.said, "```", ""]
    return "\n".join([*lines, result.printed.rstrip(), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--only", nargs="+", metavar="PART", help="check, kernels, steps-8b, …")
    parser.add_argument("--commit", help="where this is no git checkout")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA GPU here; see --smoke --device cpu", file=sys.stderr)
        return 2
    chosen = parts(args.device, args.smoke)
    names = [part.name for part in chosen]
    unknown = set(args.only or ()) - set(names)
    if unknown:
        print(
            f"no part {', '.join(sorted(unknown))}; there are {', '.join(names)}", file=sys.stderr
        )
        return 2
    where = machine(args.device, args.commit or _commit())
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in chosen:
        if args.only and part.name not in args.only:
            continue
        result = run(part)
        text = document(result, where)
        (args.out / f"gpu-{part.name}.md").write_text(text, encoding="utf-8")
        print(text, flush=True)
        if result.said:
            failed.append(part.name)
    if failed:
        print(f"not finished: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
