"""Equal inputs and versions give equal bytes, in one process and across processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.golden_recipes import RECIPES
from tests.support.models import write_calibration


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calibration(tmp_path_factory.mktemp("words") / "words.txt")


def test_compiled_twice(calibration: Path, tmp_path: Path) -> None:
    """All from one capture in this process."""
    first, second = (
        RECIPES["gemma3-cats"].compile(calibration).save(tmp_path / f"{index}.sirius")
        for index in range(2)
    )
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_compiled_by_two_processes(name: str, calibration: Path, tmp_path: Path) -> None:
    """In processes with other hash seeds, so sets and dictionaries have other orders."""
    code = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from tests.support.golden_recipes import RECIPES\n"
        f"RECIPES[{name!r}].compile(Path({str(calibration)!r})).save(sys.argv[1])\n"
    )
    path = os.pathsep.join(part for part in sys.path if part)
    made = []
    for seed in ("1", "2"):
        target = tmp_path / f"{seed}.sirius"
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, target], env=environment, check=True)
        made.append(target.read_bytes())
    assert made[0] == made[1]
