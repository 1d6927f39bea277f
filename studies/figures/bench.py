"""What races measured: cost against length, and bars where there is no length."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from jambascope.studies.figures.theme import FIRST, GUIDE, SECOND, frame

PEERS = (SECOND, "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
MARKERS = ("square", "diamond", "triangle-up", "x", "star")
DASHES = ("dash", "dot", "dashdot", "longdash")


class Point(NamedTuple):
    """One side at one size: median, lowest and highest run."""

    side: str
    d_model: int
    length: int
    median: float
    low: float
    high: float


def cost_against_length(
    title: str,
    subtitle: str,
    points: Sequence[Point],
    unit: str = "time (ms)",
    bounds: Collection[str] = (),
    first: str = "jambascope",
    log_cost: bool = True,
) -> go.Figure:
    """A panel for each width, a line for each side, whiskers from the lowest to the highest run.

    Args:
        bounds: sides that are no competitors but what the work costs at least: grey and dashed.
        first: the side in the first colour.
        log_cost: both axes logarithmic; otherwise cost counts from zero.
    """
    widths = sorted({p.d_model for p in points})
    titles = [f"d_model {w}" for w in widths] if len(widths) > 1 else None
    fig = make_subplots(1, len(widths), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.04)
    looks = _looks([p.side for p in points], bounds, first)
    shown = set()
    for column, width in enumerate(widths, 1):
        for side, look in looks.items():
            line = sorted(p for p in points if p.side == side and p.d_model == width)
            if not line:
                continue
            fig.add_trace(_line(line, side, unit, side not in shown, look), 1, column)
            shown.add(side)
    ticks = sorted({p.length for p in points})
    axis = {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": [f"{t:,}" for t in ticks]}
    fig.update_xaxes(**axis, title="length T (tokens)", showgrid=False, zeroline=False, tickangle=0)
    fig.update_yaxes(**(_log_axis(points) if log_cost else {"rangemode": "tozero"}), zeroline=False)
    fig.update_yaxes(gridcolor="rgba(128,128,128,0.25)")
    fig.update_yaxes(title=unit, col=1)
    return _framed(fig, title, subtitle, 470)


def _log_axis(points: Sequence[Point]) -> dict:
    """A logarithmic axis with at least three numbers on it, however little the costs differ."""
    values = [v for p in points for v in (p.low, p.high) if v > 0]
    if not values or max(values) >= 1000 * min(values):
        return {"type": "log", "dtick": 1}
    if max(values) >= 10 * min(values):
        return {"type": "log", "dtick": "D2"}  # 1, 2, 5, 10, 20 ...
    low, high = min(values) / 1.1, 1.1 * max(values)
    power = math.floor(math.log10(high - low))
    for step in (5 * 10.0**power, 2 * 10.0**power, 10.0**power, 5 * 10.0 ** (power - 1), 2 * 10.0 ** (power - 1)):
        ticks = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(ticks) >= 3:
            break
    texts = [f"{t:.6g}" for t in ticks]
    ends = [math.log10(low), math.log10(high)]
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": texts, "range": ends}


def costs(
    title: str,
    subtitle: str,
    points: Sequence[Point],
    unit: str,
    bounds: Collection[str] = (),
    first: str = "jambascope",
) -> go.Figure:
    """A bar for each side and width, with whiskers, for what has no length."""
    looks = _looks([p.side for p in points], bounds, first)
    fig = go.Figure()
    for side, look in looks.items():
        bars = [p for p in points if p.side == side]
        fig.add_trace(
            go.Bar(
                y=[f"d_model {p.d_model}" for p in bars],
                x=[p.median for p in bars],
                name=side,
                orientation="h",
                marker={"color": look["color"]},
                error_x=_whiskers(bars),
                text=[f"{p.median:.3g}" for p in bars],
                textposition="inside",
                insidetextanchor="start",
                insidetextfont={"color": "#10151B"},
                hovertemplate=f"{side}, %{{y}}: %{{x:.4g}} {unit}<extra></extra>",
            )
        )
    fig.update_xaxes(title=unit, rangemode="tozero", gridcolor="rgba(128,128,128,0.25)", zeroline=False)
    fig.update_yaxes(title="width", autorange="reversed", showgrid=False)
    rows = len({p.d_model for p in points}) * len(looks)
    return _framed(fig, title, subtitle, 200 + 34 * rows)


def _looks(sides: Sequence[str], bounds: Collection[str], first: str) -> dict[str, dict]:
    """Colour, dash and marker of every side, in the order in which they come."""
    looks, peers, guides = {}, 0, 0
    for side in dict.fromkeys(sides):
        if side in bounds:
            looks[side] = {"color": GUIDE, "dash": DASHES[guides % len(DASHES)], "symbol": "line-ew-open"}
            guides += 1
        elif side == first:
            looks[side] = {"color": FIRST, "dash": "solid", "symbol": "circle"}
        else:
            color, symbol = PEERS[peers % len(PEERS)], MARKERS[peers % len(MARKERS)]
            looks[side] = {"color": color, "dash": "solid", "symbol": symbol}
            peers += 1
    return looks


def _line(line: Sequence[Point], side: str, unit: str, in_legend: bool, look: dict) -> go.Scatter:
    return go.Scatter(
        x=[p.length for p in line],
        y=[p.median for p in line],
        error_y=_whiskers(line),
        name=side,
        legendgroup=side,
        showlegend=in_legend,
        mode="lines+markers",
        line={"color": look["color"], "dash": look["dash"], "width": 2},
        marker={"symbol": look["symbol"], "size": 8},
        hovertemplate=f"{side}, T %{{x:,}}: %{{y:.4g}} {unit}<extra></extra>",
    )


def _whiskers(points: Sequence[Point]) -> dict:
    return {
        "type": "data",
        "symmetric": False,
        "array": [p.high - p.median for p in points],
        "arrayminus": [p.median - p.low for p in points],
        "thickness": 1,
        "width": 3,
    }


def _framed(fig: go.Figure, title: str, subtitle: str, height: int) -> go.Figure:
    frame(fig, title, subtitle, height=height)
    # Below the axes: the names of peers take more room than there is beside the title.
    below = {"orientation": "h", "yanchor": "top", "y": -0.2, "xanchor": "left", "x": 0, "yref": "paper"}
    fig.update_layout(legend=below, margin={"t": 100 if fig.layout.annotations else 78, "b": 110})
    return fig
