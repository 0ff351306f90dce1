"""`sirius chat`: a conversation, at a terminal or line by line from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sirius_runtime.cli.command import Command
from sirius_runtime.cli.options import (
    add_generation,
    add_loading,
    add_template,
    generation_options,
    loading_options,
    sampling_options,
)
from sirius_runtime.cli.results import summary, write_text
from sirius_runtime.command_line import say, tell, unescaped
from sirius_runtime.errors import ArtifactError, ConfigError, GenerationError, shown
from sirius_runtime.terminal import LINES, plain

if TYPE_CHECKING:
    from sirius_runtime.conversation import Conversation

_HELP = """\
/reset         forget what was said
/system TEXT   set the system message to TEXT, and forget what was said
/system        show the system message
/quit          end (so does Ctrl-D)
//TEXT         send /TEXT to the model
Ctrl-C         stop an answer"""
_PROMPT = ">>> "
_HISTORY_LINES = 1000


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_template(parser)
    add_generation(parser)
    add_loading(parser)


def _run(args: argparse.Namespace) -> None:
    from sirius_runtime.conversation import Conversation
    from sirius_runtime.loading import load

    options = generation_options(args) | sampling_options(args)
    system = None if args.system is None else unescaped(args.system, "--system")
    conversation = Conversation(
        load(**loading_options(args)),
        system=system,
        chat_template=args.chat_template,
        mode=args.mode,
        **options,
    )
    if sys.stdin is None:
        raise ConfigError("stdin is closed; write messages to it, one per line")
    if sys.stdin.isatty():
        with _history():
            _at_terminal(conversation)
    else:
        for line in _piped_lines():
            if not _take(conversation, line):
                return


def _at_terminal(conversation: Conversation) -> None:
    tell("type a message, or /help; Ctrl-D ends")
    interrupted = False
    while True:
        try:
            if interrupted:  # printed inside `try`: another Ctrl-C does not end the program
                tell("\n/quit or Ctrl-D ends")
                interrupted = False
            line = _read_line()
        except EOFError:
            tell("")
            return
        except KeyboardInterrupt:
            interrupted = True
            continue
        if not _take(conversation, line):
            return


def _read_line() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT)
    # `input` would write the prompt between the answers.
    print(_PROMPT, end="", file=sys.stderr, flush=True)  # noqa: T201
    if line := sys.stdin.readline():
        return line.removesuffix("\n")
    raise EOFError


def _piped_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"line {number} of stdin can't be read (byte {error.start} is not UTF-8); convert "
                "it to UTF-8"
            ) from error


def _take(conversation: Conversation, line: str) -> bool:
    """Runs a command or answers a message; returns whether the conversation goes on."""
    command, _, rest = line.strip().partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        conversation.reset(conversation.system)
    elif command == "/system" and rest.strip():
        conversation.reset(rest.strip())
    elif command == "/system":
        tell(plain(conversation.system or "there is no system message", keep=LINES))
    elif command == "/help":
        tell(_HELP)
    elif command.startswith("/") and not command.startswith("//"):
        tell(f"there is no command {plain(shown(command))}; /help lists them")
    elif line.strip():
        _answer(conversation, line.removeprefix("/") if command.startswith("//") else line)
    return True


def _answer(conversation: Conversation, text: str) -> None:
    try:
        answer = conversation.ask(text, write_text)
    except (GenerationError, ArtifactError) as error:
        if not sys.stdin.isatty():
            raise
        tell(f"sirius: {plain(str(error), keep=LINES)}")
        return
    say("")
    if answer.output is None:
        if not sys.stdin.isatty():
            raise KeyboardInterrupt
        tell("sirius: stopped")
        return
    tell(f"sirius: {summary(answer.output)}")
    if answer.full:
        tell("sirius: the conversation fills the model's context; /reset starts over")
    elif answer.output.finish_reasons[0] == "length":
        tell("sirius: the answer was cut at its greatest length; --max-new-tokens sets it")


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Keeps the typed lines for the next conversation, where Python has `readline`."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    path = history_file()
    with contextlib.suppress(OSError):
        if _is_file(path):
            readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a history that can't be written is no error
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.touch(mode=0o600)
            if _is_file(path):
                readline.write_history_file(path)


def history_file() -> Path:
    """The file with the lines of earlier conversations, in the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return folder / "sirius" / "chat_history"


def _is_file(path: Path) -> bool:
    """Whether `path` is a regular file and not a symbolic link: nothing else is overwritten."""
    return stat.S_ISREG(path.lstat().st_mode)


COMMAND = Command(
    "talk to a model that has a chat template",
    _add_arguments,
    _run,
    epilog="Each line is a message, typed or from a pipe; /help lists the commands. Answers go to "
    "stdout.",
)
