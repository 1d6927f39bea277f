"""Means with intervals, one below the other: what was measured of several things, side by side in panels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from jambascope.studies.figures.course import log_ticks
from jambascope.studies.figures.theme import FIRST, GUIDE, SECOND, frame

GRID = "rgba(128,128,128,0.25)"
COLORS = (FIRST, SECOND, "#009E73", "#CC79A7", "#8A8F98", "#D55E00", "#56B4E9")


class Dot(NamedTuple):
    """A mean with its interval."""

    row: str
    series: str
    """Decides the colour."""
    mean: float
    low: float
    high: float


def dots(
    title: str,
    subtitle: str,
    panels: Sequence[tuple[str, Sequence[Dot]]],
    unit: str,
    guides: Sequence[float | None] = (),
    log: bool = False,
) -> go.Figure:
    """A panel beside the other, rows shared; series of a row stand one below the other.

    Args:
        guides: x of a dotted line in each panel, such as what chance gives; None for no line.
        log: whether x is logarithmic.
    """
    rows = list(dict.fromkeys(dot.row for _, own in panels for dot in own))
    series = list(dict.fromkeys(dot.series for _, own in panels for dot in own))
    fig = make_subplots(
        1, len(panels), subplot_titles=[name for name, _ in panels], shared_yaxes=True, horizontal_spacing=0.03
    )
    for column, (_, own) in enumerate(panels, 1):
        for s, name in enumerate(series):
            points = [dot for dot in own if dot.series == name]
            offset = 0.0 if len(series) == 1 else 0.5 * (s / (len(series) - 1) - 0.5)
            fig.add_trace(_trace(points, rows, offset, name, COLORS[s % len(COLORS)], column == 1), 1, column)
        guide = guides[column - 1] if guides else None
        if guide is not None:
            fig.add_vline(guide, line={"color": GUIDE, "dash": "dot"}, row=1, col=column)
    ticks = {"tickmode": "array", "tickvals": list(range(len(rows))), "ticktext": rows}
    fig.update_yaxes(ticks | {"range": [len(rows) - 0.4, -0.6], "showgrid": False, "zeroline": False})
    fig.update_xaxes(gridcolor=GRID, zerolinecolor=GUIDE, title={"text": unit, "standoff": 6}, nticks=7)
    for column, (_, own) in enumerate(panels if log else (), 1):
        ends = [value for dot in own for value in (dot.mean, dot.low, dot.high) if 0 < value < math.inf]
        ticks = log_ticks(min(ends) / 1.3, max(ends) * 1.3, 4) if ends else []
        texts = [f"{tick:.4g}" if tick < 1e5 else f"{tick:.0e}".replace("e+", "e") for tick in ticks]
        axis = {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": texts, "tickangle": 0}
        fig.update_xaxes(axis, row=1, col=column)
    height = (210 if len(series) > 1 else 170) + max(60, (14 + 13 * len(series)) * len(rows))
    frame(fig, title, subtitle, height=height, showlegend=len(series) > 1)
    below = {"orientation": "h", "yanchor": "bottom", "y": 0, "yref": "container", "xanchor": "left", "x": 0}
    return fig.update_layout(legend=below, margin={"t": 105, "b": 105 if len(series) > 1 else 65})


def _trace(points: Sequence[Dot], rows: Sequence[str], offset: float, name: str, color: str, named: bool) -> go.Scatter:
    known = [math.isfinite(p.low) and math.isfinite(p.high) for p in points]
    return go.Scatter(
        x=[p.mean for p in points], y=[rows.index(p.row) + offset for p in points], mode="markers", name=name,
        legendgroup=name, showlegend=named, marker={"color": color, "size": 8},
        error_x={
            "type": "data", "symmetric": False, "color": color, "width": 4,
            "array": [p.high - p.mean if k else 0 for p, k in zip(points, known, strict=True)],
            "arrayminus": [p.mean - p.low if k else 0 for p, k in zip(points, known, strict=True)],
        },
        customdata=[(p.row, p.low, p.high) for p in points],
        hovertemplate=f"%{{customdata[0]}}, {name}: %{{x:.4g}} "
        "[%{customdata[1]:.4g}, %{customdata[2]:.4g}]<extra></extra>",
    )  # fmt: skip
