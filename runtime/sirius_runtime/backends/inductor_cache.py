"""Where inductor keeps its code, which it loads again without a look at who wrote it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sirius_runtime.errors import BackendError

INDUCTOR_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def check_name(folder: Path, variable: str) -> None:
    """Raises BackendError, naming the environment variable that chooses `folder`, for one whose
    path inductor loses: it splits its compiler's command line at spaces, and drops quotes.
    """
    path = str(folder)
    try:
        kept = shlex.split(path) == [path]
    except ValueError:  # a quote that none closes
        kept = False
    if not kept:
        raise BackendError(
            f"code can't be compiled in {path!r}: inductor takes no folder with spaces, quotes or "
            f"backslashes in its path; name another by the environment variable {variable}"
        )


@contextmanager
def keeps_code_in(folder: Path) -> Iterator[None]:
    """Within it, inductor keeps its code there; it reads the environment at each compilation."""
    before = os.environ.get(INDUCTOR_VARIABLE)
    os.environ[INDUCTOR_VARIABLE] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(INDUCTOR_VARIABLE, None)
        else:
            os.environ[INDUCTOR_VARIABLE] = before
