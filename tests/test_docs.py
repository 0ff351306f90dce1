"""What the documentation shows runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


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
