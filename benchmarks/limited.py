"""Runs a command under a hard memory limit, in a Linux control group (version 1 or 2)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sirius_runtime.errors import ConfigError

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """A control group: the files with its processes, its limit and its peak memory."""

    folder: Path
    limit: str
    peak: str

    @property
    def most(self) -> int:
        """Bytes, of which what the page cache holds for the group is a part."""
        return int((self.folder / self.peak).read_text())


@contextlib.contextmanager
def group(limit: int) -> Iterator[Group]:
    """A group of `limit` bytes, removed at the end. Raises ConfigError if none can be made."""
    first = (_ROOT / "memory").is_dir()
    parent = _ROOT / "memory" if first else _ROOT
    own = Group(
        parent / f"sirius-{os.getpid()}",
        "memory.limit_in_bytes" if first else "memory.max",
        "memory.max_usage_in_bytes" if first else "memory.peak",
    )
    try:
        own.folder.mkdir()
        (own.folder / own.limit).write_text(str(limit))
    except OSError as error:
        raise ConfigError(
            f"no control group can be made in {parent} ({error.strerror}): run as root, on Linux"
        ) from error
    try:
        yield own
    finally:
        for _ in range(50):  # for a moment the group still counts processes that have ended
            try:
                own.folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def run(command: Sequence[str], limit: int) -> tuple[str, int]:
    """What a command says on stdout, and the most bytes that it held; ConfigError where it fails,
    as one that the limit kills does.
    """
    with group(limit) as own, tempfile.TemporaryFile("w+") as errors:
        join = f'echo $$ > {own.folder}/cgroup.procs && exec "$@"'
        done = subprocess.run(
            ["/bin/sh", "-c", join, "sh", *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
        if done.returncode:
            errors.seek(0)
            raise ConfigError(
                f"{' '.join(command)} ended with {done.returncode}: {errors.read()[-2000:]}"
            )
        return done.stdout, own.most
