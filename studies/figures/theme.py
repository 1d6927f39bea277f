"""What all figures share: colours, token labels, axes, and the frame with title and units.

Figures carry no background and no text colour of their own, so that whatever shows them (Streamlit, a notebook, a
report) themes them light or dark. Colours are safe for the common forms of colour blindness: viridis for amounts,
cividis for shares, red to blue centred on zero for signed values (blue is positive), and Okabe and Ito's for kinds.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import plotly.io
from jaxtyping import Float

AMOUNT = "Viridis"
SHARE = "Cividis"
SIGNED = "RdBu"
KIND_COLORS = {"attention": "#E69F00", "mamba": "#0072B2", "mamba2": "#CC79A7", "moe": "#009E73", "dense": "#8A8F98"}
KIND_NAMES = {
    "attention": "attention",
    "mamba": "Mamba",
    "mamba2": "Mamba-2",
    "moe": "mixture of experts",
    "dense": "dense SwiGLU",
}
FIRST, SECOND = "#2F86C5", "#E69F00"
"""Two lines that are compared."""
GUIDE = "#8A8F98"
SELECTED = "#D55E00"
"""Marks of what is selected: visible on white and on black."""
BLANK = "rgba(128,128,128,0.10)"
"""Behind heatmaps with empty cells, so that small values differ from none on any page."""

READABLE = "#757575"
"""Text with a contrast of 4.6 to 1 on white and on black alike."""

MAX_NAMED_TOKENS = 80
"""Up to so many positions an axis names every token; beyond, it counts positions and tokens are in the hover text."""
MAX_LABEL = 14


def label(text: str) -> str:
    """A token as a figure can show it: blanks visible, long ones cut, and ``<unk>`` not taken for markup."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"
    if len(shown) > MAX_LABEL:
        shown = shown[: MAX_LABEL - 1] + "…"
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def named(text: str, position: int) -> str:
    """A token within a sentence."""
    return f"“{label(text)}” ({position})"


def token_axis(
    tokens: Sequence[str], start: int = 0, title: str = "token (position)", room: int = MAX_NAMED_TOKENS
) -> dict:
    """A Plotly axis over positions ``start..start + len(tokens)`` that names tokens while they can be read.

    Args:
        room: how many names the figure's width has place for; with more tokens every nth is named, as the title says.
    """
    end = start + len(tokens)
    axis: dict = {"title": {"text": title}, "range": [start - 0.5, end - 0.5], "showgrid": False, "zeroline": False}
    if len(tokens) > MAX_NAMED_TOKENS:
        axis["title"]["text"] = "position (tokens); drag to zoom in"
        return axis
    step = -(-len(tokens) // room)
    if step > 1:
        axis["title"]["text"] = f"{title}, one in {step} named"
    at = range(start, end, step)
    few = len(at) <= 40
    names = [f"{label(tokens[t - start])} {t}" if few else label(tokens[t - start]) for t in at]
    return axis | {
        "tickmode": "array",
        "tickvals": list(at),
        "ticktext": names,
        "tickangle": -60 if few else -90,
        "tickfont": {"size": 11 if few else 9},
    }


def reversed_token_axis(
    tokens: Sequence[str], start: int = 0, title: str = "token (position)", room: int = MAX_NAMED_TOKENS
) -> dict:
    """The same going down, for the rows of a matrix."""
    axis = token_axis(tokens, start, title, room)
    return axis | {"range": axis["range"][::-1], "tickangle": 0}


def integer_axis(values: Sequence[int], title: str) -> dict:
    """A category-like axis over layers, heads or experts: every value while there are few, then every nth."""
    step = max(1, -(-len(values) // 32))
    shown = list(range(0, len(values), step))
    return {
        "title": {"text": title},
        "tickmode": "array",
        "tickvals": shown,
        "ticktext": [str(values[i]) for i in shown],
        "range": [-0.5, len(values) - 0.5],
        "showgrid": False,
        "zeroline": False,
    }


def color_bar(title: str, **more) -> dict:
    """A slim colour bar with the quantity and its unit along its side."""
    return {"title": {"text": title, "side": "right", "font": {"size": 12}}, "thickness": 12, "outlinewidth": 0} | more


def signed_limit(values: Float[np.ndarray, ...], share: float = 0.995) -> float:
    """Where a scale centred on zero ends: the quantile ``share`` of magnitudes, so that outliers do not hide the rest.

    The largest magnitude where that quantile is zero, and 1 where everything is.
    """
    magnitudes = np.abs(values)
    return float(np.quantile(magnitudes, share)) or float(magnitudes.max()) or 1.0


def frame(
    fig: go.Figure, title: str, subtitle: str = "", height: int = 360, room: int | None = None, **layout
) -> go.Figure:
    """Title, subtitle, size and margins; backgrounds stay transparent.

    Args:
        room: letters of the subtitle that a line has place for; the height is that of a figure with one line.
    """
    if room is not None:
        subtitle = "<br>".join(textwrap.wrap(subtitle, room))
    more = 17 * subtitle.count("<br>")
    text = {"text": title, "subtitle": {"text": subtitle, "font": {"size": 13}}}
    place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "yref": "container", "pad": {"t": 10}}
    fig.update_layout(
        title=text | place,
        height=height + more,
        margin={"l": 60, "r": 20, "t": 78 + more if subtitle else 56, "b": 60},
        paper_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"font": {"family": "monospace"}, "align": "left"},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "xanchor": "right", "x": 1.0},
        **{"plot_bgcolor": "rgba(0,0,0,0)"} | layout,
    )
    # Plotly measures every label to hide those that stick out, which with names of tokens takes as long as the drawing.
    fig.update_xaxes(automargin=True, ticklabeloverflow="allow")
    fig.update_yaxes(automargin=True, ticklabeloverflow="allow")
    return fig


def ordered_colors(count: int) -> list[str]:
    """Colours of an ordered family of lines, from blue over grey to orange: each readable on white and on black."""
    stops = np.array([[47, 120, 196], [138, 143, 152], [224, 130, 20]], dtype=float)
    at = np.linspace(0, 2, count) if count > 1 else np.array([0.0])
    rgb = np.stack([np.interp(at, [0, 1, 2], stops[:, c]) for c in range(3)], axis=1)
    return [f"rgb({r:.0f},{g:.0f},{b:.0f})" for r, g, b in rgb]


def click_targets(
    x: Sequence[float], y: Sequence[float], custom: Sequence, hover: Sequence[str], size: int
) -> go.Scatter:
    """Invisible squares over a heatmap: Streamlit reports clicks on points, not on the cells of a heatmap."""
    return go.Scatter(
        x=np.asarray(x),
        y=np.asarray(y),
        mode="markers",
        marker={"symbol": "square", "size": size, "opacity": 0},
        selected={"marker": {"opacity": 0}},
        unselected={"marker": {"opacity": 0}},
        # Arrays: lists Plotly would check entry by entry, which takes longer than all the rest.
        customdata=np.asarray(custom, object),
        text=np.asarray(hover),
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
        name="click targets",
    )


def in_notebook() -> None:
    """From now on figures show in any notebook, with text that can be read on a light and on a dark page.

    A notebook, unlike the dashboard and the reports, does not tell Plotly whether it is light or dark; and where the
    server lacks Plotly's extension (it may run in another environment than the kernel), only HTML is shown.
    """
    plotly.io.templates["notebook"] = go.layout.Template(layout={"font": {"color": READABLE}})
    plotly.io.templates.default = "plotly+notebook"
    if plotly.io.renderers.default == "plotly_mimetype":
        plotly.io.renderers.default = "plotly_mimetype+notebook"
