"""Results as lines of JSON, so that a run that was cut short goes on where it ended.

The first line is a header: the settings that results depend on, and the artifact. Each later line
is one problem in one mode. A last line without its end, which a killed run leaves, is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from sirius_runtime.errors import ConfigError, shown
from sirius_runtime.new_file import check_target
from sirius_runtime.stats import PeriodSteps

FORMAT = 1
Key = tuple[str, str]  # problem, mode


@dataclass(frozen=True)
class Result:
    """One problem in one mode. `dense`: tokens that dense steps made.

    density: of the sparse path in this batch. seconds: the row's share of its batch's time after
    prefill, by tokens, so that they add up to it.
    """

    problem: str
    mode: str
    correct: bool
    strict: bool | None
    answer: str | None
    text: str
    tokens: int
    finish: str
    periods: tuple[PeriodSteps, ...]
    dense: int
    density: float
    seconds: float

    @property
    def key(self) -> Key:
        return self.problem, self.mode


class Results:
    """The results so far, in memory and, where it has a path, in its file."""

    def __init__(self, settings: Mapping[str, Any], path: Path | None) -> None:
        """Reads what the file has. Raises ConfigError where it is of other settings, which are
        named, or is no file of results.
        """
        self.done: dict[Key, Result] = {}
        self._file: BinaryIO | None = None
        self._settings = json.loads(json.dumps(settings))
        if path is None:
            return
        check_target(path)
        whole = _read(path, self._settings, self.done) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(whole)
        if not whole:
            self._write({"sirius_eval": FORMAT, "settings": self._settings})

    def add(self, results: Iterable[Result]) -> None:
        """Takes results, and writes them before it returns."""
        for result in results:
            self.done[result.key] = result
            self._write(asdict(result))

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _read(path: Path, settings: Mapping[str, Any], done: dict[Key, Result]) -> int:
    """Reads a file's whole lines into `done`; returns how many bytes they are."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    for number, line in enumerate(lines, 1):
        try:
            fields_of_line = json.loads(line)
            if number == 1:
                found = _header(fields_of_line)
            else:
                result = _result(fields_of_line)
                done[result.key] = result
        except (ValueError, TypeError, LookupError) as error:
            raise ConfigError(
                f"{path}, line {number}: it is no result of an evaluation ({error}); give another "
                "--out, or remove the file"
            ) from error
        if number == 1:
            _compare(path, found, settings)
    return whole


def _header(line: Any) -> Mapping[str, Any]:
    if line["sirius_eval"] != FORMAT:
        raise ValueError(f"format {line['sirius_eval']}, and this version reads {FORMAT}")
    settings = line["settings"]
    if not isinstance(settings, dict):
        raise ValueError("its settings are no object")
    return settings


def _result(line: Mapping[str, Any]) -> Result:
    known = {field.name for field in fields(Result)}
    if line.keys() != known:
        raise ValueError(f"its fields are not {', '.join(sorted(known))}")
    periods = (PeriodSteps(int(k), int(a), *map(bool, copied)) for k, a, *copied in line["periods"])
    return Result(**{**line, "periods": tuple(periods)})


def _compare(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    names = [*settings, *(name for name in found if name not in settings)]
    differing = [
        f"{name} {_short(found.get(name))} there and {_short(settings.get(name))} now"
        for name in names
        if found.get(name) != settings.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{path} holds results of other settings: {'; '.join(differing)}. Give another --out, "
            "or the settings of the file"
        )


def _short(value: Any) -> str:
    return (
        shown(value[:12] if len(value) == 64 else value) if isinstance(value, str) else f"{value}"
    )
