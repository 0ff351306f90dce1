"""Shared by all command lines: exit codes, the standard streams, and reading of text, numbers and
paths.

The exit code is 0, 2 for an error that the user can fix, 70 for a bug, and 130 after Ctrl-C. Errors
print a message and no traceback. If the reader of stdout closes it (``| head``), the exit code is
0.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from sirius_runtime.errors import ConfigError, SiriusError, UserError, shown
from sirius_runtime.new_file import check_target
from sirius_runtime.terminal import LINES, plain
from sirius_runtime.threads import check_threads

ESCAPES = r"\n, \t and \r stand for a line break, a tab and a carriage return, \\ for a backslash"
"""The rule of `unescaped`, for ``--help``."""

MOST_TEXT_BYTES = 64 * 2**20
"""Limit of a prompt from a file or stdin: longer than the longest sequence of any model."""

_MEANINGS = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_NAME_BYTES = 255  # of one name in a path: what Linux, macOS and Windows allow
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def finish(program: str, command: Callable[[], int | None]) -> int:
    """Runs `command` and returns the exit code: the command's own, or that of its error. Messages
    begin with `program`.
    """
    _prepare_streams()
    code = _code(program, command)
    _let_go_of_broken_streams()
    return code


def _code(program: str, command: Callable[[], int | None]) -> int:
    own = None
    try:
        if sys.stdout is None:
            raise UserError("stdout is closed; to discard the output, redirect it to /dev/null")
        try:
            own = command()
        except SystemExit as stop:  # of a parser: --help, or an error that it has printed
            _raise_origin(stop)
            if stop.code:
                return stop.code if isinstance(stop.code, int) else UserError.exit_code
        say("", end="")  # flushes stdout
    except UserError as error:
        tell(f"{program}: error: {plain(str(error), keep=LINES)}")
        return error.exit_code
    except SiriusError as error:
        tell(f"{program}: internal error: {plain(str(error), keep=LINES)}")
        return error.exit_code
    except KeyboardInterrupt:
        tell(f"\n{program}: interrupted")
        return _INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        return 0
    except OSError as error:
        of = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, str | bytes) else ""
        tell(f"{program}: error: the system refused: {_reason(error)}{of}")
        return UserError.exit_code
    return own or 0


def _raise_origin(stop: SystemExit) -> None:
    """Raises the KeyboardInterrupt or BrokenPipeError behind a parser's SystemExit, if there is
    one: some parsers turn these into exits with other codes.
    """
    error: BaseException | None = stop
    while error is not None:
        if isinstance(error, KeyboardInterrupt | BrokenPipeError):
            raise error
        error = error.__cause__ or error.__context__


def say(text: str, end: str = "\n") -> None:
    """Writes to stdout and flushes it.

    Raises BrokenPipeError where stdout's reader has closed it, and UserError where stdout can't be
    written.
    """
    try:
        print(text, end=end, flush=True)  # noqa: T201  (what a command line is for)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(
            f"stdout can't be written ({_reason(error)}); free some space there, or write elsewhere"
        ) from error


def tell(message: str) -> None:
    """Writes a line to stderr. If stderr is closed or can't be written, nothing happens."""
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)  # noqa: T201


def unescaped(text: str, flag: str) -> str:
    """A flag's text with its escapes replaced as `ESCAPES` says; other backslashes are kept.

    Raises ConfigError for bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as outside:
        # Bytes that the locale's encoding lacks come as lone surrogates, but may be UTF-8.
        try:
            text = os.fsencode(text).decode()
        except UnicodeError as error:
            raise ConfigError(
                f"{flag} holds bytes that are not UTF-8 (character {outside.start}); encode it as "
                "UTF-8"
            ) from error
    return re.sub(r"\\([ntr\\])", lambda match: _MEANINGS[match[1]], text)


def read_text(source: BinaryIO, name: str) -> str:
    """The UTF-8 text of `source`, without one line break at the end, which an editor, `echo` or
    Enter adds.

    Raises ConfigError, naming `name`, where it can't be read, is not UTF-8 or is longer than
    `MOST_TEXT_BYTES`.
    """
    try:
        content = source.read(MOST_TEXT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} can't be read ({_reason(error)})") from error
    if len(content) > MOST_TEXT_BYTES:
        raise ConfigError(
            f"{name} can't be read (it holds more than {MOST_TEXT_BYTES} bytes, more than any "
            "prompt); give a shorter text"
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} can't be read (byte {error.start} is not UTF-8: 0x{content[error.start]:02x})"
            "; convert it to UTF-8"
        ) from error
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def read_text_file(path: Path, name: str) -> str:
    """As `read_text`, for a file."""
    try:
        with path.open("rb") as file:
            return read_text(file, name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} can't be read ({_reason(error)})") from error


def read_stdin(name: str) -> str:
    """As `read_text`, for stdin."""
    if sys.stdin is None:
        raise ConfigError(f"{name} can't be read (stdin is closed); give a file or a flag instead")
    if sys.stdin.isatty():
        tell(f"reading {name} from the terminal; end it with Ctrl-D")
    return read_text(sys.stdin.buffer, name)


def whole_number(text: str) -> int:
    """For argparse: an int."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a whole number is needed, got {shown(text)}") from None


def real_number(text: str) -> float:
    """For argparse: a float."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number is needed, got {shown(text)}") from None


def positive_number(text: str) -> int:
    """For argparse: an int of 1 or more."""
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"1 or more is needed, got {number}")
    return number


def threads_argument(text: str) -> int:
    """For argparse: threads of one operator that this machine can have."""
    with _as_argument_error():
        check_threads(number := whole_number(text))
    return number


def path_argument(text: str) -> Path:
    """For argparse: as `read_path`."""
    with _as_argument_error():
        return read_path(text)


def new_file_argument(text: str) -> Path:
    """For argparse: a path where a file can be written."""
    with _as_argument_error():
        check_target(path := read_path(text))
    return path


def folder_argument(text: str) -> Path:
    """For argparse: a folder, or a path where one can be made."""
    path = path_argument(text)
    first = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not first.is_dir():
        raise argparse.ArgumentTypeError(f"{shown(str(first))} is not a folder")
    return path


@contextlib.contextmanager
def _as_argument_error() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def read_path(text: str | Path) -> Path:
    """The path that a command line names, with ``~`` and ``~user`` expanded: a shell expands them
    only at the start of a word, not after ``--out=``.

    Raises ConfigError for text that can't be a path.
    """
    if not str(text):
        raise ConfigError("a path is needed, got ''")
    if "\0" in str(text):
        raise ConfigError(f"a path can't hold a NUL character, got {shown(str(text))}")
    try:
        path = Path(text)
        if str(text).startswith("~"):  # Path("./~x") drops the ./, so `text` is tested
            path = path.expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{shown(str(text))} begins with ~ and the name of a user that this machine does not "
            "have; write ./~… for a file of that name"
        ) from error
    for part in path.parts:
        if (size := len(os.fsencode(part))) > _NAME_BYTES:
            raise ConfigError(
                f"{shown(part)} is too long for a file's name: {size} bytes, at most {_NAME_BYTES}"
            )
    return path


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _prepare_streams() -> None:
    """Makes stdout and stderr accept any text: a character that their encoding lacks is written as
    an escape (``\\u2019``). A closed stderr is replaced by the null device: it is None in Python,
    and prints to it would go to stdout.
    """
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  (for as long as the process lives)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _let_go_of_broken_streams() -> None:
    """Redirects a stream that can't be written to the null device: else Python tries to flush it
    at exit and reports the failure.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
