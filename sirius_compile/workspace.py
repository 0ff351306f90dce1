"""The files that a compilation keeps on disk while it runs: weights in their stored form, and the
choices for the sparse path.

They are in a folder `.NAME.<16 hex digits>.work` beside the artifact NAME. Weights that are cast,
transposed or nested are written there once and memory-mapped afterwards, so no copy of them is held
in memory. A process locks its folder while it runs. The next compilation of the same artifact
removes the folders of killed processes; with `--resume` it takes one over, if the killed
compilation had the same options, files and versions. A file is renamed to its final name once it is
complete, so every file found under such a name is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from sirius_compile.resident import LARGE, SHARE, bounded
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import ArtifactError, ConfigError, SiriusError, UserError
from sirius_runtime.new_file import check_target, lock
from sirius_runtime.safetensors_file import size_of
from sirius_runtime.spec import JSON, WeightSpec

_NAME_KEPT = 50  # characters of the artifact's name in the folder's name, as names have a limit
_LOCK, _IDENTITY = "lock", "identity.json"


class Workspace:
    """The folder of one compilation. Leaving the `with` block removes it, unless the compilation
    was interrupted or the disk was full: then `--resume` continues from it.
    """

    folder: Path

    def __init__(
        self,
        target: Path,
        *,
        resume: bool = False,
        tell: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`target`: the artifact's path. `resume`: take over the folder of a killed compilation.
        `tell`: called with messages for the user.

        Raises ConfigError if no file can be written at `target`.
        """
        check_target(target)
        self._target, self._resume, self._tell = target, resume, tell
        self._stem = f".{target.name[:_NAME_KEPT]}."
        self._lock: BinaryIO | None = None
        self._bounds = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bounds.close()
        if self._lock is None:
            return
        full = isinstance(error, WorkspaceError | ArtifactError)
        if error is None or (isinstance(error, SiriusError) and not full):
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._tell(f"the finished work is kept in {self.folder}; continue it with --resume")
        self._lock.close()
        self._lock = None

    def begin(self, identity: JSON) -> None:
        """Takes over the folder of a killed compilation, or makes a new one.

        `identity`: everything that the stored files depend on. Raises ConfigError if the folder to
        resume from has another identity, and WorkspaceError if no folder can be made.
        """
        text = json.dumps(identity, sort_keys=True)
        for folder, opened in self._left_over():
            if self._resume and self._lock is None:
                self._take_over(folder, opened, text)
                continue
            size = sum(path.stat().st_size for path in folder.iterdir())
            shutil.rmtree(folder, ignore_errors=True)
            opened.close()
            hint = "" if self._resume else "; with --resume, they would have been used"
            self._tell(f"removed {size / 1e6:,.0f} MB of files of a killed compilation{hint}")
        if self._lock is not None:
            return
        if self._resume:
            self._tell("--resume: no files of a killed compilation of this artifact; starting anew")
        with self._disk_faults():
            self.folder = self._target.parent / f"{self._stem}{secrets.token_hex(8)}.work"
            self.folder.mkdir()
            self._lock = (self.folder / _LOCK).open("xb")
            lock(self._lock)
        self.keep(_IDENTITY, text)

    def _take_over(self, folder: Path, opened: BinaryIO, identity: str) -> None:
        try:
            found = (folder / _IDENTITY).read_text()
        except FileNotFoundError:  # killed before anything was done
            found = identity
        if found != identity:
            opened.close()
            raise ConfigError(
                f"--resume: the killed compilation of {self._target} had other options, files or "
                f"versions ({_differences(found, identity)}). Give the same, or leave --resume out"
            )
        self.folder, self._lock = folder, opened
        self.keep(_IDENTITY, identity)
        done = sum(1 for path in folder.iterdir() if path.suffix == ".weight")
        self._tell(f"--resume: {done} weights are stored already")

    def _left_over(self) -> Iterator[tuple[Path, BinaryIO]]:
        """The folders that no running process has locked, each with its lock file, locked now."""
        name = re.compile(re.escape(self._stem) + r"[0-9a-f]{16}\.work")
        for folder in sorted(self._target.parent.iterdir()):
            if not name.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            with contextlib.suppress(OSError):
                opened = (folder / _LOCK).open("ab")
                if lock(opened):
                    yield folder, opened
                else:
                    opened.close()

    def bound(self, weights: int, files: Sequence[Path]) -> None:
        """Bounds the resident pages of mapped files until the `with` block ends.

        `weights`: the bytes of the model's weights; if they are few, nothing is done. `files`: the
        checkpoint's. The files of this folder and the artifact are bounded with them.
        """
        if weights > LARGE:
            own = f"{self._target.parent.resolve()}/{self._stem}"
            paths = [own, *(str(path.resolve()) for path in files)]
            self._bounds.enter_context(bounded(paths, int(SHARE * weights)))

    def keep(self, name: str, text: str) -> None:
        """Writes a small file, whole or not at all."""
        self._write(name, text.encode())

    def recall(self, name: str) -> str | None:
        """The text that `keep` wrote under this name, or None."""
        try:
            return (self.folder / name).read_text()
        except FileNotFoundError:
            return None

    def weight(self, spec: WeightSpec, make: Callable[[], Tensor], *, keep: bool = True) -> Tensor:
        """The stored form of a weight, mapped from its file.

        If there is no file yet, `make` computes the stored form, and the file is written; without
        `keep`, no file is written and the result is in memory.
        """
        size = size_of(spec)
        key = repr((spec.name, spec.dtype, spec.shape, spec.transposed, spec.nested))
        name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.weight"
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != size:
            if size == 0 or not keep:
                return make()
            flat = make().contiguous().view(-1).view(torch.uint8)
            self._write(name, flat.numpy().data)
            del flat
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return mapped.view(dtype_of(spec.dtype)).view(spec.shape)

    def _write(self, name: str, content: bytes | memoryview) -> None:
        part = self.folder / "part"
        with self._disk_faults():
            with part.open("wb") as file:
                file.write(content)
            part.replace(self.folder / name)

    @contextlib.contextmanager
    def _disk_faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WorkspaceError(
                f"the working files for {self._target.name} can't be written to "
                f"{self._target.parent} ({error.strerror or error}). They need up to the "
                "artifact's size, and the artifact as much again. Free some space and continue "
                "with --resume, or write the artifact to another folder"
            ) from error


class WorkspaceError(UserError):
    """The folder beside the artifact can't be written to, with the reason."""


def _differences(one: str, other: str) -> str:
    """The names of the fields in which two identities differ."""
    found, wanted = json.loads(one), json.loads(other)
    names = [name for name in wanted if found.get(name) != wanted[name]]
    return ", ".join(names) or "others"


def fingerprint(path: Path) -> JSON:
    """The names, sizes and modification times of a folder's files, or of one file. None if `path`
    can't be read; opening the model reports that.
    """
    try:
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    except OSError:
        return None
