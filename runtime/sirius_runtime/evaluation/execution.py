"""Runs a program of unknown origin in a limited child process: see `limited_child` for its limits.

Nothing else in this project executes what a model wrote.
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
_GRACE = 5.0  # seconds for Python to start, beyond the program's own
_ENVIRONMENT = {
    "PATH": os.defpath,
    "LC_ALL": "C.UTF-8",
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
}
_REMEDY = (
    "answers are executed in a child process that can neither write, nor start processes, nor "
    "reach a network, and this system has no such limits (seccomp); evaluate on Linux, x86-64 or "
    "ARM, or leave out tasks that execute code"
)


@dataclass(frozen=True)
class Limits:
    """What the child may use: seconds on the clock and of CPU, bytes of memory, open files."""

    seconds: float = 10.0
    memory: int = 2 * 2**30
    files: int = 64


@dataclass(frozen=True)
class Executed:
    """Whether the program ran to its end; `reason`: "passed", or why not."""

    passed: bool
    reason: str


def check_can_limit(limits: Limits) -> None:
    """Raises ConfigError where this system can't limit a child: better now than after answers."""
    if not run_limited("", limits).passed:
        raise ConfigError(
            "a program that does nothing fails in the limited child (see --code-memory and "
            "--code-seconds)"
        )


def run_limited(program: str, limits: Limits) -> Executed:
    """Runs a Python program, in a new folder, to its end or to its limits.

    It has passed where it has run to its last line: an exit before that, with whatever code, has
    not. Raises ConfigError where this system can't limit a child; then nothing has run.
    """
    if sys.platform != "linux":
        raise ConfigError(_REMEDY)
    # The child tells that the program has ended by a word that the program is not given.
    word = secrets.token_hex(16)
    order = json.dumps({"program": program, "word": word, "limits": asdict(limits)})
    # What it tells goes to a file, whose size is limited, and not to a pipe that it could flood.
    with tempfile.TemporaryDirectory(prefix="sirius-eval-") as folder, TemporaryFile() as told:
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=told,
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
        told.seek(0)
        return _read(told.read(), word, child.returncode)


def _read(told: bytes, word: str, code: int) -> Executed:
    first, _, reason = told.decode(errors="replace").partition("\n")
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
    """Ends the child and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
