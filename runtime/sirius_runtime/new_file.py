"""Writes files under a temporary name and renames them. Only regular files are replaced.

A rename replaces whatever has the name: a named pipe with a waiting reader, a device node, or a
symbolic link. So a target that exists and is not a regular file is refused.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import sys
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from sirius_runtime.errors import ConfigError

if sys.platform != "win32":
    import fcntl

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NAME_KEPT = 50  # characters of the target's name in the temporary name, whose length is limited


def check_target(path: Path) -> None:
    """Raises ConfigError, with the reason, where no file can be written to `path`: its folder does
    not exist, or something other than a regular file has the name.
    """
    try:
        if not path.parent.is_dir():
            what = "is not a folder" if path.parent.exists() else "does not exist; create it first"
            raise ConfigError(f"{path}: the folder {path.parent} {what}")
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{str(path)!r} can't be written ({reason}); give another path") from None
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{path} is a folder; give the path of a file")
    if stat.S_ISLNK(mode):
        raise ConfigError(
            f"{path} is a symbolic link (to {path.readlink()}), and only regular files are "
            "replaced; give the path of the file itself"
        )
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise ConfigError(
            f"{path} is {kind}, and only regular files are replaced; give another path"
        )


def into_place(temporary: Path, path: Path) -> None:
    """Renames a finished file to `path`, and syncs the folder so that the rename is durable.

    Raises ConfigError as `check_target` does, and OSError.
    """
    check_target(path)
    temporary.replace(path)
    with contextlib.suppress(OSError):  # Windows and some mounts can't
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, completely or not at all. Raises ConfigError and OSError."""
    with NewFile(path) as new:
        new.file.write(content)
        new.finish()


class NewFile:
    """A file that is written under a temporary name beside `path`; `finish` renames it.

    Leaving the `with` block without `finish` removes it. Temporary files of `path` that killed
    processes left are removed first; a process locks its file while it writes. Raises ConfigError
    as `check_target` does, and OSError.
    """

    file: BinaryIO
    temporary: Path

    def __init__(self, path: Path) -> None:
        check_target(path)
        self.path = path
        self._stem = f".{path.name[:_NAME_KEPT]}."

    def __enter__(self) -> Self:
        self._remove_left_over()
        while True:
            self.temporary = self.path.parent / f"{self._stem}{secrets.token_hex(8)}.tmp"
            self.file = self.temporary.open("x+b")
            if lock(self.file) and self._is_there():
                return self
            self.file.close()  # another process took the file for a left-over one and removed it

    def finish(self) -> None:
        """Makes the file appear at `path`, whole and on disk."""
        self.close()
        into_place(self.temporary, self.path)

    def close(self) -> None:
        """Ends writing and syncs the file to disk, under the temporary name."""
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk may refuse the last bytes
            self.file.close()
        self.temporary.unlink(missing_ok=True)

    def _is_there(self) -> bool:
        try:
            found, own = self.temporary.stat(), os.fstat(self.file.fileno())
        except FileNotFoundError:
            return False
        return (found.st_ino, found.st_dev) == (own.st_ino, own.st_dev)

    def _remove_left_over(self) -> None:
        name = re.compile(re.escape(self._stem) + r"[0-9a-f]{16}\.tmp")
        for other in self.path.parent.iterdir():
            if name.fullmatch(other.name) and other.is_file() and not other.is_symlink():
                with contextlib.suppress(OSError), other.open("rb") as file:
                    if lock(file):
                        other.unlink()


def lock(file: BinaryIO) -> bool:
    """Locks an open file until it is closed; False where another process holds the lock."""
    if sys.platform == "win32":  # no lock needed: a file that another process has open stays
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
