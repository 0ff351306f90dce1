"""Every method, mode and back end gives the output in the golden file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import golden
from tests.support.models import write_calibration

WRITTEN: dict[str, dict[str, golden.Tokens]] = json.loads(golden.FILE.read_text())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("calibration") / "words.txt")


def test_the_file_holds_every_case_and_no_other() -> None:
    assert list(WRITTEN) == [case.key for case in golden.cases()]


@pytest.mark.slow
@pytest.mark.parametrize("case", golden.cases(), ids=lambda case: case.key)
def test_tokens_are_the_golden_ones(case: golden.Case, text: Path) -> None:
    assert golden.generated(case, text) == WRITTEN[case.key]
