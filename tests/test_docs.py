"""What the documentation shows runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sirius_runtime.graph_operators import FUNCTIONS, OPERATORS
from sirius_runtime.spec import FORMAT_VERSION, NESTED_FORMAT_VERSION
from tests.support.artifacts import sample, write

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_the_worked_example_of_a_new_method(tmp_path: Path) -> None:
    """In a process of its own: it registers an operator."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "ADD_A_METHOD.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    assert not re.search(r"import .*\b_\w", "\n".join(blocks)), "private names"
    script = tmp_path / "example.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 rewrites, largest difference ")
    assert float(done.stdout.split()[4]) < 1e-5


FORMAT = (DOCS / "format.md").read_text()


def marked(name: str) -> str:
    """A part of the specification, between its comments."""
    (found,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", FORMAT, re.DOTALL)
    return found


def test_the_specification_names_every_operator() -> None:
    """Whoever adds a row to the tables adds it to docs/format.md."""
    own = re.findall(r"^\| `(\w+)` \|", marked("operators of ours"), re.MULTILINE)
    torch_s = re.findall(r"`([^`]+)`", marked("operators of PyTorch"))
    told = [*(f"aten.{name}" for name in torch_s), *(f"sirius.{name}.default" for name in own)]
    assert sorted(told) == sorted(OPERATORS)
    functions = re.search(r"`python\.` functions.*?: (.*)\.\n", FORMAT)
    assert functions is not None
    assert re.findall(r"`(\w+)`", functions[1]) == list(FUNCTIONS)


def test_the_specification_names_every_version() -> None:
    found = re.findall(r"^\| (\d+)\.(\d+) \|", FORMAT, re.MULTILINE)
    versions = [(int(major), int(minor)) for major, minor in found]
    assert versions[-2:] == [FORMAT_VERSION, NESTED_FORMAT_VERSION]
    own, nested = (".".join(map(str, version)) for version in versions[-2:])
    assert f"format versions {own} and, for nested weights, {nested}." in " ".join(FORMAT.split())


def test_the_specification_s_reader_reads(tmp_path: Path) -> None:
    write(path := tmp_path / "model.sirius", sample())
    (block,) = re.findall(r"```python\n(.*?)```", FORMAT, re.DOTALL)
    (script := tmp_path / "reader.py").write_text(block)
    done = subprocess.run(
        [sys.executable, "-I", script, path], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"4 {sum(t.numel() for t in sample().values())}\n", done.stderr
