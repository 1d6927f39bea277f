"""The frame of a report: one HTML file that needs nothing else, light or dark as the reader's system is."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs


def render(title: str, parts: Sequence[str]) -> str:
    """The page of parts, given as HTML; empty ones are left out."""
    head = f"<title>{html.escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script>"
    body = "\n".join(part for part in parts if part)
    page = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{VIEWPORT}{head}</head><body>{body}'
    return f"{page}<script>{PAINT}</script></body></html>\n"


def plot(figure: go.Figure) -> str:
    """A figure in a box."""
    config = {"displaylogo": False, "responsive": True}
    return f'<div class="plot">{to_html(figure, include_plotlyjs=False, full_html=False, config=config)}</div>'


def section(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], marks: Mapping[str, str] | None = None
) -> str:
    """A heading and a table; nothing without rows. ``marks``: text of a cell -> its class, ``yes`` or ``no``."""
    if not rows:
        return ""

    def cell(text: str) -> str:
        kind = (marks or {}).get(text)
        return f'<td class="{kind}">{html.escape(text)}</td>' if kind else f"<td>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{html.escape(title)}</h2><div class="wide">{table}</div>'


VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2733; --faint: #5b6673; --line: #dde2e7; --box: #f3f5f7;
  --yes: #00734f; --no: #b04a00; }
@media (prefers-color-scheme: dark) { :root { --page: #10151b; --ink: #e3e8ed; --faint: #9aa5b1; --line: #2e3945;
  --box: #1a222b; --yes: #35c796; --no: #f2954d; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 1180px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
pre { background: var(--box); padding: .7rem 1rem; border-radius: 6px; white-space: pre-wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
.yes { color: var(--yes); white-space: nowrap; } .no { color: var(--no); white-space: nowrap; }
.plot { border: 1px solid var(--line); border-radius: 6px; padding: .4rem; margin: 1rem 0; }
"""
PAINT = """
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function paint() {
  const ink = getComputedStyle(document.body).color;
  for (const plot of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(plot, {"font.color": ink});
}
dark.addEventListener("change", paint);
paint();
"""
