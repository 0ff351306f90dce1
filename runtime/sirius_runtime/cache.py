"""The user's cache folder. It holds machine code, so a file that another user could have put there
is never loaded.

A folder is safe if it and every folder above it belong to this user or to root, and nobody else may
write to them (a folder above may be sticky, as /tmp is). A file in it is used if it belongs to this
user and nobody else may write to it. Otherwise the code is built again, and a line on stderr says
so. If the folder itself is not safe, the code is built in a private folder of this process. Windows
has no such checks: a user's folders are private there.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

from sirius_runtime.terminal import plain

CACHE_VARIABLE = "SIRIUS_CACHE"

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def cache_folder() -> Path:
    """The folder for compiled code, ``$SIRIUS_CACHE`` or ``~/.cache/sirius``; it may not exist."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "sirius"


def private_folder(folder: Path, *, deep: bool = False) -> Path:
    """`folder`, created (0700) if needed; or a private folder of this process, if another user
    could have put files into `folder`.

    deep: check all files in it, for libraries that load files without a check; other callers check
    each file by `is_own`. Raises OSError where the folder can't be created.
    """
    if not hasattr(os, "getuid"):
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    _make(folder)
    fault = _folder_fault(folder) or (_content_fault(folder) if deep else None)
    return folder if fault is None else _in_place_of(folder, fault)


def is_own(path: Path) -> bool:
    """Whether `path` is a file that only this user can have written; stderr says so if not."""
    if not hasattr(os, "getuid"):
        return path.is_file()
    try:
        found = path.lstat()
    except OSError:
        return False
    fault = _fault(found)
    if fault is None and not stat.S_ISREG(found.st_mode):
        fault = "is not a regular file"
    if fault is not None:
        _say(f"{path} {fault}; it is not used, but built again")
    return fault is None


def _make(folder: Path) -> None:
    missing = []
    for place in (folder, *folder.parents):
        if place.exists():
            break
        missing.append(place)
    for place in reversed(missing):
        place.mkdir(mode=0o700, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")


def _folder_fault(folder: Path) -> str | None:
    whole = folder.resolve()
    if fault := _fault(whole.stat()):
        return f"it {fault}"
    for place in whole.parents:
        found = place.stat()
        if found.st_uid not in (0, os.getuid()):
            return f"the folder {place} above it belongs to another user"
        if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
            return f"other users may write to the folder {place} above it"
    return None


def _content_fault(folder: Path) -> str | None:
    """Why a file in the folder is not safe, or None. Where others can't enter the folder, the modes
    of the files in it do not matter.
    """
    reachable = folder.stat().st_mode & _OTHERS
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            found = path.lstat()
            if found.st_uid != os.getuid() or (reachable and _fault(found)):
                return f"{path} {_fault(found)}"
    return None


def _fault(found: os.stat_result) -> str | None:
    if found.st_uid != os.getuid():
        return "belongs to another user"
    if found.st_mode & _OTHERS_WRITE and not stat.S_ISLNK(found.st_mode):
        return "may be written by other users"
    return None


@functools.cache
def _in_place_of(folder: Path, fault: str) -> Path:
    """A private folder of this process, removed at its end."""
    own = Path(tempfile.mkdtemp(prefix="sirius-"))  # 0700
    process = os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # not at a child's end
            shutil.rmtree(own, ignore_errors=True)

    atexit.register(remove)
    _say(
        f"the cache folder {folder} is not safe to load code from ({fault}); the code is built "
        f"again for this process. Remove that folder, or name one of your own in {CACHE_VARIABLE}"
    )
    return own


def _say(message: str) -> None:
    print(plain(f"sirius: {message}"), file=sys.stderr)  # noqa: T201  (seconds of silence follow)
