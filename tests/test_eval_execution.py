"""Programs of models run in a limited child alone; each limit is seen to hold."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from sirius_runtime.errors import ConfigError
from sirius_runtime.evaluation import execution
from sirius_runtime.evaluation.execution import (
    TIMED_OUT,
    Executed,
    Limits,
    check_can_limit,
    run_limited,
)
from sirius_runtime.evaluation.python_answers import CodeGrader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits are those of Linux")
LIMITS = Limits(seconds=1, memory=2**29)
REFUSED = "PermissionError: [Errno 13] Permission denied"


def test_a_program_passes_at_its_end() -> None:
    check_can_limit(LIMITS)
    assert run_limited("import math, typing\nassert math.pi > 3", LIMITS) == Executed(
        True, "passed"
    )


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(0)", "exited before its end"),
        ("import os; os._exit(0)", "exited with 0 before its end"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import ctypes; ctypes.string_at(0)", "killed by SIGSEGV"),
        ("def f(): f()\nf()", "RecursionError"),
        ("x = 'x' * 2**30", "MemoryError"),
        ("while True: pass", TIMED_OUT),
        pytest.param("import time; time.sleep(60)", TIMED_OUT, marks=pytest.mark.gate),
        ("fs = [open('/dev/null') for _ in range(100)]", "OSError: [Errno 24]"),
        ("import socket; socket.socket()", REFUSED),
        ("import os; os.fork()", REFUSED),
        ("import subprocess; subprocess.run(['true'])", REFUSED),
        ("import os; os.execv('/bin/true', ['true'])", REFUSED),
        ("import os; os.kill(os.getppid(), 9)", REFUSED),
        ("open('here', 'w')", REFUSED),
        ("import os; os.mkdir('here')", REFUSED),
        ("import os; os.open('/dev/shm/x', os.O_CREAT | os.O_RDWR)", REFUSED),
        ("import resource as r; r.setrlimit(r.RLIMIT_AS, (-1, -1))", REFUSED),
    ],
)
def test_what_a_program_may_not_do_fails_it(program: str, reason: str) -> None:
    start = time.monotonic()
    executed = run_limited(program, LIMITS)
    assert not executed.passed
    assert executed.reason.startswith(reason)
    assert time.monotonic() - start < 10


def test_files_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("kept")
    for call in (f"os.unlink({str(path)!r})", f"os.rename({str(path)!r}, 'x')"):
        assert run_limited(f"import os\n{call}", LIMITS).reason.startswith(REFUSED)
    for mode in ("w", "a", "r+"):
        assert run_limited(f"open({str(path)!r}, {mode!r})", LIMITS).reason.startswith(REFUSED)
    assert run_limited(f"assert open({str(path)!r}).read() == 'kept'", LIMITS).passed
    assert path.read_text() == "kept"


def test_the_child_has_a_folder_of_its_own_and_none_of_our_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    program = (
        "import os\n"
        "assert os.listdir('.') == []\n"
        f"assert os.getcwd() != {str(Path.cwd())!r}\n"
        "assert 'SECRET' not in os.environ\n"
    )
    assert run_limited(program, LIMITS) == Executed(True, "passed")


def test_output_goes_nowhere() -> None:
    assert run_limited("import sys\nfor _ in range(100): print('x' * 10**6)", LIMITS).passed
    flood = (
        "import contextlib, os\n"
        "while True:\n"
        "    for fd in range(3, 9):\n"
        "        with contextlib.suppress(OSError): os.write(fd, b'x' * 65536)\n"
    )
    assert not run_limited(flood, LIMITS).passed


def test_a_system_without_limits_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution.sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"evaluate on Linux"):
        run_limited("", LIMITS)


def test_humaneval_grades_by_its_tests() -> None:
    test = "\n\ndef check(candidate):\n    assert candidate(2) == 4\n"
    grader = CodeGrader("def twice(x):\n", test, "twice", chat=False, limits=LIMITS)
    assert grader.grade("    return x * 2\n").correct
    wrong = grader.grade("    return x\n")
    assert not wrong.correct
    assert wrong.answer == "AssertionError: "
