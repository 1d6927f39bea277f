"""A page that somebody else wrote, shown so that it can do nothing here."""

from __future__ import annotations

import html

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""It may run its own scripts, which its figures need, and load nothing."""


def framed(page: str) -> str:
    """A page in a frame of an origin of its own: its scripts reach neither this page, its session nor the network."""
    inner = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{page}'
    style = "<style>html, body {margin: 0; height: 100%} iframe {border: 0; width: 100%; height: 100%}</style>"
    return f'{style}<iframe sandbox="allow-scripts" title="report" srcdoc="{html.escape(inner)}"></iframe>'
