"""Pages of ours: what they refer to, and what a browser shows of them, where there is one."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_WITHOUT_END = ("meta", "input", "rect", "circle", "path")


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page: its document, and how many colours its picture has."""

    document: str
    colours: int


def _command(folder: Path) -> list[str]:
    """The browser without a screen, and its flags; skips the test where there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(BROWSERS)}")
    # A browser refuses its sandbox to root, who needs none for a page of our own.
    return [
        *(browser, "--headless", "--disable-gpu", "--enable-logging=stderr"),
        *("--window-size=1100,1600", f"--user-data-dir={folder / 'profile'}"),
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]


class Tab:
    """An open page that a test uses: by the DevTools protocol, over pipes."""

    def __init__(self, told: BinaryIO, says: BinaryIO) -> None:
        self._told, self._says, self._count, self._session = told, says, 0, None

    def open(self, url: str) -> None:
        """Opens an address."""
        target = self._call("Target.createTarget", url=url)["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def value(self, script: str) -> Any:
        """What JavaScript comes to in the page."""
        told = self._call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        """Waits until JavaScript comes to something true."""
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def _call(self, method: str, **parameters: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._told.write(json.dumps(message).encode() + b"\0")
        self._told.flush()
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> bytes:
        read = bytearray()
        while (byte := self._says.read(1)) != b"\0":
            assert byte, "the browser has gone"
            read += byte
        return bytes(read)


@contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """A browser with a page to open; skips the test where there is none."""
    command = _command(folder)
    (their_in, ours_out), (ours_in, their_out) = os.pipe(), os.pipe()
    redirect = (
        "import os, sys; told, says, *command = sys.argv[1:]; "
        "os.dup2(int(told), 3); os.dup2(int(says), 4); os.execvp(command[0], command)"
    )
    pipes = [str(their_in), str(their_out)]
    browser = subprocess.Popen(
        [sys.executable, "-c", redirect, *pipes, *command, "--remote-debugging-pipe"],
        pass_fds=(their_in, their_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(their_in)
    os.close(their_out)
    try:
        with os.fdopen(ours_out, "wb") as told, os.fdopen(ours_in, "rb") as says:
            yield Tab(told, says)
    finally:
        browser.terminate()
        browser.wait(30)


def look(page: Path, folder: Path) -> Seen:
    """Opens a page in a browser without a screen; skips the test where there is none.

    Fails where the browser says something of the page: breaches of its policy.
    """
    shot, command = folder / "page.png", [*_command(folder), "--virtual-time-budget=2000"]
    said = []
    for action in ("--dump-dom", f"--screenshot={shot}"):
        done = subprocess.run(
            [*command, action, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert "CONSOLE" not in done.stderr
        said.append(done.stdout)
    return Seen(said[0], _colours(shot))


def _colours(path: Path) -> int:
    Image = pytest.importorskip("PIL.Image")
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(2**24))


class Reader(HTMLParser):
    """What a page refers to, and its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in _WITHOUT_END:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @classmethod
    def check(cls, text: str) -> None:
        """A page that needs nothing and runs nothing, and whose policy allows nothing more."""
        reader = cls()
        reader.feed(text)
        assert reader.open == []  # all that was opened was closed
        assert not reader.tags & {"script", "img", "link", "iframe", "object", "form", "base"}
        for name, value in reader.attributes:
            assert not name.startswith("on")
            assert name not in ("style", "src", "srcset", "action")
            if name == "href":
                assert re.fullmatch(r"#s\d+", value)
        [style] = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
        assert "url(" not in style
        assert "@import" not in style
        assert "prefers-color-scheme: dark" in style
        [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert policy == (
            f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        )
