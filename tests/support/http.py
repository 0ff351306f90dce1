"""Requests without a client of anybody's."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Told:
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Told:
    """Gets a page, or posts a body: bytes as they are, anything else as JSON."""
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **(headers or {})}
    request = urllib.request.Request(url, data=content, headers=given)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return Told(response.status, dict(response.headers), response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Told(error.code, dict(error.headers), error.read())
