"""Effects of patches as maps over layers and roles; means with intervals side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from jambascope.studies.figures.theme import BLANK, FIRST, GUIDE, SECOND, SELECTED, SIGNED, color_bar, frame

GRID = "rgba(128,128,128,0.25)"
COLORS = (SECOND, FIRST, "#009E73", "#CC79A7", "#8A8F98", "#D55E00")
MOST_NAMED = 24


class Panel(NamedTuple):
    """One component."""

    title: str
    rows: tuple[str, ...]
    """Layers, or heads of layers, bottom first."""
    values: Float[np.ndarray, "rows columns"]
    """NaN where there is no such cell."""
    marked: tuple[tuple[int, int], ...] = ()
    """(row, column) of cells that get a frame."""


def effect_maps(
    title: str, subtitle: str, columns: Sequence[str], panels: Sequence[Panel], unit: str, limit: float = 1.0
) -> go.Figure:
    """A map for each component, two side by side, on one signed scale.

    Args:
        columns: names of what is patched, left to right.
        limit: where the colour scale ends on both sides.
    """
    columns = [html.escape(column, quote=False) for column in columns]  # tokens may look like markup
    wide = min(2, len(panels))
    rows = -(-len(panels) // wide)
    heights = [max(len(p.rows) for p in panels[i * wide : (i + 1) * wide]) for i in range(rows)]
    total = sum(30 * h for h in heights) + 70 * rows
    fig = make_subplots(
        rows, wide, subplot_titles=[p.title for p in panels], row_heights=heights, horizontal_spacing=0.12,
        vertical_spacing=46 / max(total, 92), shared_xaxes=True,
    )  # fmt: skip
    for i, panel in enumerate(panels):
        at = {"row": i // wide + 1, "col": i % wide + 1}
        hover = [[f"{panel.title}, {row}<br>{column}" for column in columns] for row in panel.rows]
        fig.add_trace(
            go.Heatmap(
                z=panel.values, x=list(range(len(columns))), y=list(range(len(panel.rows))), customdata=hover,
                coloraxis="coloraxis", xgap=1, ygap=1, hoverongaps=False,
                hovertemplate="%{customdata}<br>%{z:.3f}<extra></extra>",
            ), **at,
        )  # fmt: skip
        for row, column in panel.marked:
            box = {"x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5}
            fig.add_shape(type="rect", line={"color": SELECTED, "width": 2}, **box, **at)
        ticks = {"tickmode": "array", "showgrid": False, "zeroline": False}
        fig.update_yaxes(tickvals=list(range(len(panel.rows))), ticktext=list(panel.rows), **ticks, **at)
        step = -(-len(columns) // MOST_NAMED)
        shown = list(range(0, len(columns), step))
        last = i + wide >= len(panels)
        fig.update_xaxes(
            tickvals=shown, ticktext=[columns[c] for c in shown], tickangle=-40, showticklabels=last, **ticks, **at
        )
    fig.update_layout(
        coloraxis={"colorscale": SIGNED, "cmin": -limit, "cmax": limit, "colorbar": color_bar(unit, thickness=12)}
    )
    return frame(fig, title, subtitle, height=total + 240, plot_bgcolor=BLANK).update_layout(margin={"t": 110})


class Mean(NamedTuple):
    """A mean with its interval."""

    panel: str
    row: str
    kind: str
    mean: float
    low: float
    high: float
    n: int


def means(title: str, subtitle: str, points: Sequence[Mean], unit: str) -> go.Figure:
    """Means with 95 % intervals: a panel for each model, a line for each thing, a colour for each kind."""
    panels, rows, kinds = (list(dict.fromkeys(getattr(p, name) for p in points)) for name in ("panel", "row", "kind"))
    fig = make_subplots(1, len(panels), subplot_titles=panels, shared_yaxes=True, horizontal_spacing=0.04)
    for column, panel in enumerate(panels, 1):
        for side, kind in enumerate(kinds):
            own = [p for p in points if p.panel == panel and p.kind == kind]
            aside = 0.6 * (0.5 - (side + 0.5) / len(kinds))
            known = [math.isfinite(p.low) and math.isfinite(p.high) for p in own]
            color = COLORS[side % len(COLORS)]
            fig.add_trace(
                go.Scatter(
                    x=[p.mean for p in own], y=[len(rows) - 1 - rows.index(p.row) + aside for p in own], name=kind,
                    legendgroup=kind, showlegend=column == 1, mode="markers", marker={"color": color, "size": 9},
                    error_x={
                        "type": "data", "symmetric": False, "color": color, "width": 4,
                        "array": [p.high - p.mean if k else 0 for p, k in zip(own, known, strict=True)],
                        "arrayminus": [p.mean - p.low if k else 0 for p, k in zip(own, known, strict=True)],
                    },
                    customdata=[(p.row, p.low, p.high, p.n) for p in own],
                    hovertemplate=f"%{{customdata[0]}}, {kind}<br>%{{x:.3f}} [%{{customdata[1]:.3f}}, "
                    "%{customdata[2]:.3f}], n = %{customdata[3]}<extra></extra>",
                ), 1, column,
            )  # fmt: skip
        fig.add_vline(x=0, line={"color": GUIDE, "width": 1}, row=1, col=column)
        fig.update_xaxes(title={"text": unit}, gridcolor=GRID, zeroline=False, row=1, col=column)
    ticks = {"tickmode": "array", "tickvals": list(range(len(rows))), "ticktext": rows[::-1]}
    fig.update_yaxes(ticks | {"range": [-0.6, len(rows) - 0.4], "showgrid": False, "zeroline": False})
    frame(fig, title, subtitle, height=190 + len(rows) * max(30, 17 * len(kinds)))
    below = {"orientation": "h", "yanchor": "bottom", "y": 0, "yref": "container", "xanchor": "left", "x": 0}
    return fig.update_layout(legend=below, margin={"t": 105, "b": 105})
