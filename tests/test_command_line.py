"""How command lines read text, numbers and paths, and how they end: streams that are closed, full,
of another encoding or read no further, and Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sirius_runtime import command_line
from sirius_runtime.command_line import (
    finish,
    path_argument,
    read_path,
    read_stdin,
    read_text_file,
    real_number,
    say,
    unescaped,
    whole_number,
)
from sirius_runtime.errors import ConfigError, SiriusError, UserError, shown
from tests.support.cli import Cli
from tests.support.models import TinyModels


@pytest.fixture(scope="module")
def artifact(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    return tiny("llama", "topk").compiled.save(folder / "modèle’s.sirius")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


# the text of flags


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (r"a\nb", "a\nb"),
        (r"\t\r\n", "\t\r\n"),
        (r"a\\nb", r"a\nb"),
        (r"\\", "\\"),
        (r"\\\n", "\\\n"),
        (r"\\\\n", r"\\n"),
        (r"\d \x41 \ ", r"\d \x41 \ "),
        ("\\", "\\"),
        ("a\nb", "a\nb"),
        ("’é", "’é"),
        ("", ""),
    ],
)
def test_one_rule_of_escapes(given: str, meant: str) -> None:
    assert unescaped(given, "--prompt") == meant


def test_bytes_that_are_no_text_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--stop holds bytes that are not UTF-8 \(character 1\)"):
        unescaped("a\udcffb", "--stop")


def test_text_in_utf_8_is_read_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    given = "Zoe’s".encode().decode("ascii", "surrogateescape")  # as where the locale is C
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    assert unescaped(given, "--prompt") == "Zoe’s"


def test_prompt_and_stop_follow_it(
    cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sirius_runtime.model import SiriusModel

    asked: list[tuple[str, tuple[str, ...]]] = []
    generate = SiriusModel.generate

    def spy(self: SiriusModel, prompt: str, **options: object) -> object:
        asked.append((prompt, tuple(options["stop"])))  # type: ignore[arg-type]
        return generate(self, prompt, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(SiriusModel, "generate", spy)
    flags = ("--stop", r"\n", "--stop", r"a\\nb", "--max-new-tokens", "1")
    assert cli.run("run", artifact, "-p", r"w7\nw8\\n", *flags).code == 0
    assert asked == [("w7\nw8\\n", ("\n", r"a\nb"))]


def test_help_tells_the_rule(cli: Cli) -> None:
    told = " ".join(cli.run("run", "--help").out.split())
    assert command_line.ESCAPES in told
    assert "except that one line break at its end is removed" in told


# the text of files and of stdin


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"one", "one"),
        (b"one\n", "one"),
        (b"one\r\n", "one"),
        (b"one\n\n", "one\n"),
        (b"one\n\n\n", "one\n\n"),
        (b"one\r", "one\r"),
        (b"\n", ""),
        (b"", ""),
        (b"a\r\nb \n", "a\r\nb "),
        ("é’\n".encode(), "é’"),
    ],
)
def test_one_line_break_at_the_end_is_left_out(
    content: bytes, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    assert read_text_file(path, "the file") == text
    stdin(monkeypatch, content)
    assert read_stdin("the prompt") == text


def test_what_is_not_utf_8_is_named(
    cli: Cli, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latin-1.txt"
    path.write_bytes("café".encode("latin-1"))
    done = cli.run("run", artifact, "--prompt-file", path)
    assert (done.code, done.out) == (2, "")
    assert f"--prompt-file {path} can't be read (byte 3 is not UTF-8: 0xe9)" in done.err
    stdin(monkeypatch, b"\xff\xfe")
    done = cli.run("run", artifact)
    assert (done.code, done.out) == (2, "")
    assert "the prompt can't be read (byte 0 is not UTF-8: 0xff)" in done.err


def test_a_text_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "MOST_TEXT_BYTES", 1000)
    with pytest.raises(ConfigError, match="holds more than 1000 bytes"):
        read_text_file(Path("/dev/zero"), "--prompt-file")
    path = tmp_path / "long.txt"
    path.write_bytes(b"a" * 1000)
    assert len(read_text_file(path, "--prompt-file")) == 1000


def test_a_closed_stdin_is_named(cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    done = cli.run("run", artifact)
    assert (done.code, done.out) == (2, "")
    assert "the prompt can't be read (stdin is closed)" in done.err


# numbers and paths


@pytest.mark.parametrize(
    ("read", "texts"),
    [
        (whole_number, ["", "²", "--5", "1.5", "0x10", "1e3", "9" * 5000]),
        (real_number, ["", "²", "--5", "0,5", "half"]),
    ],
)
def test_numbers_say_what_they_were_given(read: Callable[[str], float], texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            read(text)
        assert shown(text) in str(refused.value)
        assert len(str(refused.value)) < 120


def test_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/own")
    assert read_path("~/m.sirius") == Path("/home/own/m.sirius")
    assert read_path("./~nosuchuser/m") == Path("~nosuchuser/m")
    assert read_path("n" * 255) == Path("n" * 255)
    for text, reason in (
        ("", "a path is needed, got ''"),
        ("a\0b", "a path can't hold a NUL character, got 'a\\x00b'"),
        ("~nosuchuser/m", "a user that this machine does not have"),
        ("n" * 256, "too long for a file's name: 256 bytes, at most 255"),
        ("a/" + "é" * 128 + "/b", "too long for a file's name: 256 bytes, at most 255"),
    ):
        with pytest.raises(ConfigError) as refused:
            read_path(text)
        assert reason in str(refused.value)
        with pytest.raises(argparse.ArgumentTypeError, match=r"path|name"):
            path_argument(text)


# how a command ends


def ending(
    error: BaseException, capsys: pytest.CaptureFixture[str], *causes: BaseException
) -> tuple[int, str]:
    def command() -> None:
        if causes:
            try:
                raise causes[0]
            except BaseException:
                raise error  # noqa: B904  (as a parser does)
        raise error

    return finish("prog", command), capsys.readouterr().err


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(UserError("no"), capsys) == (2, "prog: error: no\n")
    assert ending(SiriusError("no"), capsys) == (70, "prog: internal error: no\n")
    assert ending(KeyboardInterrupt(), capsys) == (130, "\nprog: interrupted\n")
    assert ending(BrokenPipeError(), capsys) == (0, "")
    assert ending(SystemExit(0), capsys) == (0, "")
    assert ending(SystemExit(2), capsys) == (2, "")
    # What parsers make of them.
    assert ending(SystemExit(1), capsys, KeyboardInterrupt())[0] == 130
    assert ending(SystemExit(1), capsys, BrokenPipeError()) == (0, "")
    full = OSError(28, "No space left on device", "/tmp/x")
    code, told = ending(full, capsys)
    assert code == 2
    assert told == "prog: error: the system refused: No space left on device (/tmp/x)\n"
    with pytest.raises(ZeroDivisionError):  # a bug, with its traceback
        finish("prog", lambda: 1 / 0)


def test_both_console_scripts_end_so(
    cli: Cli, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sirius_compile.compile.compile_model", interrupted)
    done = cli.compile("tally-3m", "--out", tmp_path / "m.sirius")
    assert (done.code, done.out, done.err) == (130, "", "\nsirius-compile: interrupted\n")
    monkeypatch.setattr("sirius_runtime.loading.load", interrupted)
    done = cli.run("run", artifact, "-p", "w7")
    assert (done.code, done.out, done.err) == (130, "", "\nsirius: interrupted\n")


def test_a_character_that_stdout_lacks_is_written_as_an_escape(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for encoding, name in (("ascii", rb"mod\xe8le\u2019s"), ("latin-1", b"mod\xe8le\\u2019s")):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        assert finish("prog", lambda: say(artifact.name)) == 0
        assert written.getvalue() == name + b".sirius\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_and_a_closed_stdout_are_named(
    cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = (
        lambda: cli.run("inspect", artifact),
        lambda: cli.run("run", artifact, "-p", "w7", "--max-new-tokens", "1"),
        lambda: cli.run("run", artifact, "-p", "w7", "--max-new-tokens", "1", "--json"),
        lambda: cli.run("--help"),
        lambda: cli.compile("--list-models"),
        lambda: cli.compile("--list-models", "--json"),
    )
    for command in commands:
        with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            done = command()
        assert done.code == 2, done.err
        assert "stdout can't be written (No space left on device)" in done.err
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", None)
            done = command()
        assert done.code == 2, done.err
        assert "stdout is closed" in done.err


# Python's own ending, in processes of their own


def python(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, timeout=60, **options
    )


SIRIUS = "import sys, sirius_runtime.cli as c; sys.exit(c.main({arguments!r}))"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_python_says_no_more_as_it_ends(artifact: Path) -> None:
    code = SIRIUS.format(arguments=["inspect", str(artifact)])
    with Path("/dev/full").open("w") as full:
        done = python(code, stdout=full)
        code = SIRIUS.format(arguments=["--help"])  # it imports no PyTorch
        untold = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full)
    assert untold.returncode == 0
    assert done.returncode == 2
    assert done.stderr.startswith("sirius: error: stdout can't be written (No space left")
    assert done.stderr.count("\n") == 1
    for streams in ({"stdout"}, {"stdout", "stderr"}):  # `| head`, and `2>&1 | head`
        reading, writing = os.pipe()
        os.close(reading)
        given = dict.fromkeys(streams, writing)
        done = subprocess.run(
            [sys.executable, "-c", code], timeout=60, **{"stderr": subprocess.PIPE, **given}
        )
        os.close(writing)
        assert done.returncode == 0
        assert not done.stderr


def test_ctrl_c_while_it_waits_for_a_prompt() -> None:
    code = (
        "import sys, time, sirius_runtime.cli as c, sirius_runtime.cli.options as o\n"
        "o.read_stdin = lambda name: (print('waits', flush=True), time.sleep(60))\n"
        "sys.exit(c.main(['run', 'm']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"waits\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == b"\nsirius: interrupted\n"
