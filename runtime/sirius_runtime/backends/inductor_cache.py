"""Where inductor keeps its code, which it loads again without a look at who wrote it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INDUCTOR_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


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
