"""A self-contained HTML page: it has no script and loads nothing, and its Content-Security-Policy
enforces that. The policy allows the one style sheet but no style attributes, so that widths are SVG
attributes.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable
from pathlib import Path

from sirius_runtime.terminal import without_controls


def document(title: str, style_file: Path, body: Iterable[str]) -> str:
    """The HTML of a page; `style_file` is its style sheet, `body` its lines of HTML."""
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
    """`value` escaped for HTML text or a quoted attribute. Lone surrogates, which UTF-8 can't
    encode, become backslash escapes.
    """
    text = str(value).encode(errors="backslashreplace").decode()
    return html.escape(without_controls(text))
