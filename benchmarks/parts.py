"""Runs benchmarks one after the other, each with its own time limit, even if others failed. The
output of each goes to its own file, with machine, versions and commit.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.kernels import cpu_name
from sirius_runtime.new_file import write_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy")


@dataclass(frozen=True)
class Part:
    """A module of `benchmarks`, its arguments, and its time limit in seconds."""

    name: str
    title: str
    module: str
    arguments: tuple[str, ...]
    seconds: int
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", f"benchmarks.{self.module}", *self.arguments]


@dataclass(frozen=True)
class Result:
    """How a part ended. `said`: the error, empty if it ran to its end."""

    part: Part
    printed: str
    seconds: float
    said: str


def run(part: Part) -> Result:
    begin = time.perf_counter()

    def ended(printed: str | bytes | None, said: str) -> Result:
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed or ""
        return Result(part, text, time.perf_counter() - begin, said)

    if not (ROOT / "benchmarks" / f"{part.module}.py").exists():
        return ended("", f"missing: there is no benchmarks/{part.module}.py")
    try:
        done = subprocess.run(
            part.command,
            cwd=ROOT,
            env={**os.environ, **part.environment},
            capture_output=True,
            text=True,
            timeout=part.seconds,
        )
    except subprocess.TimeoutExpired as error:
        return ended(error.stdout, f"stopped after its {part.seconds} seconds")
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-8:]
        return ended(done.stdout, "\n".join([f"exit code {done.returncode}", *lines]))
    return ended(done.stdout, "")


def machine(device: str, commit: str) -> str:
    """The machine, the versions and the commit, as a line of text."""
    name = f"{torch.get_num_threads()} threads, {cpu_name()}"
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
    said = [f"{name}={value}" for name, value in part.environment.items()]
    said += ["python", "-m", part.command[2]]
    said += [argument.removeprefix(f"{ROOT}/") for argument in part.command[3:]]
    lines += [f"`{' '.join(said)}`, {result.seconds:.0f} s", ""]
    if result.said:
        lines += ["```", result.said, "```", ""]
    return "\n".join([*lines, result.printed.rstrip(), ""])


def run_all(
    parts: Iterable[Part], device: str, out: Path, prefix: str, commit: str | None
) -> list[str]:
    """Runs the parts, writes `out`/`prefix`-*.md and prints them; returns the names of those that
    did not run to their end. `commit`: by default that of the git checkout.
    """
    where = machine(device, commit or _commit())
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in parts:
        result = run(part)
        text = document(result, where)
        write_file(out / f"{prefix}-{part.name}.md", text.encode())
        print(text, flush=True)
        if result.said:
            failed.append(part.name)
    if failed:
        print(f"not finished: {', '.join(failed)}")
    return failed


def choose(parts: list[Part], only: list[str] | None) -> list[Part]:
    """The parts with these names, or all for None. Raises ValueError for an unknown name."""
    names = [part.name for part in parts]
    unknown = set(only or ()) - set(names)
    if unknown:
        raise ValueError(f"no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [part for part in parts if not only or part.name in only]
