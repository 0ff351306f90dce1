"""The folder of inductor's compiled code. Inductor loads code there without checking its owner."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sirius_runtime.errors import BackendError

INDUCTOR_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def check_name(folder: Path, variable: str) -> None:
    """Raises BackendError for a folder that inductor can't use: it splits its compiler's command
    line at spaces and drops quotes. `variable`: the environment variable that chooses the folder.
    """
    path = str(folder)
    try:
        kept = shlex.split(path) == [path]
    except ValueError:  # an unclosed quote
        kept = False
    if not kept:
        raise BackendError(
            f"code can't be compiled in {path!r}: inductor takes no folder with spaces, quotes or "
            f"backslashes in its path; name another by the environment variable {variable}"
        )


@contextmanager
def keeps_code_in(folder: Path) -> Iterator[None]:
    """Within this context, inductor keeps its code in `folder`. It reads the environment variable
    each time it compiles.
    """
    before = os.environ.get(INDUCTOR_VARIABLE)
    os.environ[INDUCTOR_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(INDUCTOR_VARIABLE, None)
        else:
            os.environ[INDUCTOR_VARIABLE] = before
