"""Hostile artifacts by the thousand: a user's error or a right load, and nothing else.

`tests.support.fuzz` says what is changed and what counts as a fault.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import fuzz
from tests.support.artifact_mutations import KINDS
from tests.support.fuzz import SMALLEST, Hunt, Report, corpus, hunt


def check(report: Report, count: int) -> None:
    assert report.faults == []
    assert sum(report.outcomes.values()) == count
    for outcome in ("loaded", "refused"):
        assert any(told.endswith(outcome) for told in report.outcomes), outcome


def test_five_hundred_hostile_artifacts() -> None:
    check(hunt(1_000_000, 500, Hunt(names=SMALLEST, every=4)), 500)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 20_000, 2_500))
def test_twenty_thousand_hostile_artifacts(first: int) -> None:
    check(hunt(first, 2_500, Hunt(every=4)), 2_500)


@pytest.mark.gate  # it compiles the whole corpus
@pytest.mark.parametrize(
    "case",
    [
        8378,  # an arange of more than 2^63 numbers
    ],
)
def test_what_was_found_once(case: int) -> None:
    """Cases of the twenty thousand that were faults."""
    report = hunt(case, 1, Hunt(every=4))
    assert (report.faults, sum(report.outcomes.values())) == ([], 1)


def test_there_is_something_of_each() -> None:
    assert len(corpus()) >= 5
    assert len(corpus(SMALLEST)) == 2
    assert len(KINDS) >= 11


FAULTS = {
    "another exception": ("raise KeyError('x')", "KeyError: 'x'"),
    "memory": ("bytearray(2 * 10**9)", "memory"),
    "another result": ("return [7]", "loaded, and says [7] instead of"),
    "a write": ("open('../out.txt', 'w')", "written: open '../out.txt'"),
    "a removal": ("os.remove('nothing')", "written: os.remove"),
    "a process": ("os.system('true')", "written: os.system"),
    "a crash": ("os.kill(os.getpid(), signal.SIGSEGV)", "the process ended (code -11"),
    "a hang": ("signal.setitimer(signal.ITIMER_PROF, 0.2)\n    while True: pass", "(code -27"),
    "an exit": ("os._exit(0)", "the process ended (code 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_harness_sees_a_fault(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that does what it may not, in the child that the harness starts."""
    code, says = FAULTS[fault]
    script = tmp_path / "broken.py"
    script.write_text(
        "import os, signal, sys\n"
        "from tests.support import fuzz\n"
        "sound = fuzz._generate\n"
        "def broken(path, name):\n"
        "    if path.name != 'changed.sirius':\n"
        "        return sound(path, name)\n"
        f"    {code}\n"
        "    return sound(path, name)\n"
        "fuzz._generate = broken\n"
        "fuzz.main(sys.argv[1:])\n"
    )
    monkeypatch.setattr(fuzz, "MODULE", (str(script),))
    (found,) = hunt(0, 1, Hunt(kinds=("ZIP64",), names=SMALLEST)).faults
    assert says in found
