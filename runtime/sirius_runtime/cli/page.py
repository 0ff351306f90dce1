"""A page for a browser that needs nothing else: no script, nothing from elsewhere, and a policy
that says so. It allows the one style sheet and no style attributes: widths are attributes of SVG.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable
from pathlib import Path

from sirius_runtime.terminal import without_controls


def document(title: str, style_file: Path, body: Iterable[str]) -> str:
    """A page of this title and body, with the style sheet of a file."""
    style = style_file.read_text()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{escaped(title)}</title>",
            f"<style>{style}</style></head>",
            "<body><main>",
            *body,
            "</main></body></html>\n",
        )
    )


def escaped(value: object) -> str:
    """Any text as a part of the page, in its text or in a quoted attribute; what UTF-8 has no bytes
    for (lone surrogates) as Python writes it in a string.
    """
    text = str(value).encode(errors="backslashreplace").decode()
    return html.escape(without_controls(text))
