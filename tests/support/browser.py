"""Pages of ours: what they refer to, and what a browser shows of them, where there is one."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_WITHOUT_END = ("meta", "input", "rect", "circle", "path")


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page: its document, and how many colours its picture has."""

    document: str
    colours: int


def look(page: Path, folder: Path) -> Seen:
    """Opens a page in a browser without a screen; skips the test where there is none.

    Fails where the browser says something of the page: breaches of its policy.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on PATH: none of {', '.join(BROWSERS)}")
    shot = folder / "page.png"
    # A browser refuses its sandbox to root, who needs none for a page of our own.
    flags = [
        *("--headless", "--disable-gpu", "--enable-logging=stderr", "--window-size=1100,1600"),
        *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000"),
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ]
    said = []
    for action in ("--dump-dom", f"--screenshot={shot}"):
        done = subprocess.run(
            [browser, *flags, action, page.as_uri()],
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
