"""Runs an untrusted program in a child process with limits, which `limited_child` describes.

Nothing else in this project executes text that a model wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

from sirius_runtime.errors import ConfigError
from sirius_runtime.evaluation.limited_child import UNLIMITED

TIMED_OUT = "timed out"
_CHILD = Path(__file__).with_name("limited_child.py")
_GRACE = 5.0  # seconds for Python to start, added to the program's own limit
_ENVIRONMENT = {
    "PATH": os.defpath,
    "LC_ALL": "C.UTF-8",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
}
_REMEDY = (
    "answers must be executed in a child process that can't write files, start processes or reach "
    "a network, and this system can't enforce that (it needs seccomp); evaluate on Linux (x86-64 "
    "or ARM), or leave out tasks that execute code"
)


@dataclass(frozen=True)
class Limits:
    """The child's limits. seconds: of wall-clock and of CPU time; memory: bytes of address space;
    files: open files.
    """

    seconds: float = 10.0
    memory: int = 2 * 2**30
    files: int = 64


@dataclass(frozen=True)
class Executed:
    """Whether the program ran to its end. reason: "passed", or why it failed."""

    passed: bool
    reason: str


def check_can_limit(limits: Limits) -> None:
    """Raises ConfigError if this system can't limit a child. Called before the first answer."""
    if not run_limited("", limits).passed:
        raise ConfigError(
            f"an empty program fails in the limited child process ({limits.seconds:g} seconds, "
            f"{limits.memory:,} bytes of memory); raise --code-seconds"
        )


def run_limited(program: str, limits: Limits) -> Executed:
    """Runs a Python program in a new temporary folder until it ends or reaches a limit.

    It passes if it runs to its last line; an earlier exit fails, also with code 0. Raises
    ConfigError if this system can't limit a child; then the program has not run.
    """
    if sys.platform != "linux":
        raise ConfigError(_REMEDY)
    # A secret word, which the program does not know, proves that it ran to its end.
    word = secrets.token_hex(16)
    order = json.dumps({"program": program, "word": word, "limits": asdict(limits)})
    # stdout is a file of limited size, because a pipe could be flooded.
    with tempfile.TemporaryDirectory(prefix="sirius-eval-") as folder, TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=_ENVIRONMENT | {"HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            child.communicate(order.encode(), timeout=limits.seconds + _GRACE)
        except subprocess.TimeoutExpired:
            return Executed(False, TIMED_OUT)
        finally:
            _end(child)
        output.seek(0)
        return _read(output.read(), word, child.returncode)


def _read(output: bytes, word: str, code: int) -> Executed:
    first, _, reason = output.decode(errors="replace").partition("\n")
    if first == word:
        if reason == UNLIMITED:
            raise ConfigError(_REMEDY)
        return Executed(not reason, reason or "passed")
    if code in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
        return Executed(False, TIMED_OUT)
    if code < 0:
        return Executed(False, f"killed by {signal.Signals(-code).name}")
    return Executed(False, f"exited with {code} before its end")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kills the child's process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
