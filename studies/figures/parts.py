"""What changes with parts of a model: maps of layers, and means with intervals in groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from jambascope.studies.figures.theme import GUIDE, KIND_COLORS, KIND_NAMES, SIGNED, color_bar, frame

GRID = "rgba(128,128,128,0.25)"
COLORS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8A8F98")
SYMBOLS = ("circle", "diamond-open", "x")
"""Once colours come again."""


class Bar(NamedTuple):
    """A mean with its interval."""

    panel: str
    group: str
    """Where it stands on the x axis."""
    name: str
    """Its colour."""
    mean: float
    low: float
    high: float


def grouped(title: str, subtitle: str, bars: Sequence[Bar], unit: str, columns: int = 2) -> go.Figure:
    """Means with whiskers beside each other in groups, a panel for each ``panel``."""
    panels = list(dict.fromkeys(bar.panel for bar in bars))
    names = list(dict.fromkeys(bar.name for bar in bars))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    fig = make_subplots(
        rows, columns, subplot_titles=panels, shared_yaxes="all", horizontal_spacing=0.04, vertical_spacing=0.28 / rows
    )
    for i, panel in enumerate(panels):
        row, column = i // columns + 1, i % columns + 1
        groups = list(dict.fromkeys(bar.group for bar in bars if bar.panel == panel))
        for n, name in enumerate(names):
            own = [bar for bar in bars if bar.panel == panel and bar.name == name]
            aside = 0.8 * ((n + 0.5) / len(names) - 0.5)
            fig.add_trace(_points(own, groups, aside, name, n, i == 0), row, column)
        ticks = {"tickmode": "array", "tickvals": list(range(len(groups))), "ticktext": groups}
        fig.update_xaxes(**ticks, range=[-0.6, len(groups) - 0.4], showgrid=False, zeroline=False, row=row, col=column)
        fig.update_yaxes(title=unit if column == 1 else None, row=row, col=column)
    fig.update_yaxes(gridcolor=GRID, zerolinecolor=GUIDE)
    frame(fig, title, subtitle, height=210 + 230 * rows)
    below = {"orientation": "h", "yanchor": "bottom", "y": 0, "yref": "container", "xanchor": "left", "x": 0}
    return fig.update_layout(legend=below, margin={"t": 110, "b": 110})


def _points(bars: Sequence[Bar], groups: Sequence[str], aside: float, name: str, nth: int, named: bool) -> go.Scatter:
    color, symbol = COLORS[nth % len(COLORS)], SYMBOLS[nth // len(COLORS) % len(SYMBOLS)]
    known = [math.isfinite(b.low) and math.isfinite(b.high) for b in bars]
    up = [b.high - b.mean if k else 0 for b, k in zip(bars, known, strict=True)]
    down = [b.mean - b.low if k else 0 for b, k in zip(bars, known, strict=True)]
    return go.Scatter(
        x=[groups.index(b.group) + aside for b in bars], y=[b.mean for b in bars], mode="markers", name=name,
        legendgroup=name, showlegend=named, marker={"color": color, "size": 9, "symbol": symbol},
        error_y={"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": color, "width": 4},
        customdata=[(b.group, b.low, b.high) for b in bars],
        hovertemplate=f"{name}, %{{customdata[0]}}: %{{y:.3f}} [%{{customdata[1]:.3f}}, %{{customdata[2]:.3f}}]"
        "<extra></extra>",
    )  # fmt: skip


def layer_map(
    title: str,
    subtitle: str,
    mixers: Sequence[str],
    columns: Sequence[str],
    values: Float[np.ndarray, "layers columns"],
    hover: Sequence[Sequence[str]],
    unit: str,
) -> go.Figure:
    """A signed number for every layer, up, and every column; layers are named with their mixer, NaN stays empty."""
    limit = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    limit = limit or 1.0
    fig = go.Figure(
        go.Heatmap(
            z=values, zmin=-limit, zmax=limit, colorscale=SIGNED, customdata=hover, xgap=1, ygap=1,
            hovertemplate="%{customdata}<extra></extra>", colorbar=color_bar(unit), hoverongaps=False,
        )
    )  # fmt: skip
    for color, strong in (("#1c2733", False), ("#ffffff", True)):
        layers, across = (np.isfinite(values) & ((np.abs(values) > 0.6 * limit) == strong)).nonzero()
        texts = [f"{value:.2f}" for value in values[layers, across]]
        look = dict(mode="text", textfont={"color": color}, hoverinfo="skip", showlegend=False)
        fig.add_trace(go.Scatter(x=across, y=layers, text=texts, **look))
    names = [
        f'<span style="color:{KIND_COLORS[kind]}">{KIND_NAMES[kind]}</span> {layer}'
        for layer, kind in enumerate(mixers)
    ]
    frame(fig, title, subtitle, height=170 + max(80, 30 * len(mixers)))
    fig.update_xaxes(tickmode="array", tickvals=list(range(len(columns))), ticktext=list(columns), showgrid=False)
    fig.update_yaxes(tickmode="array", tickvals=list(range(len(mixers))), ticktext=names, showgrid=False)
    fig.update_yaxes(title="layer", zeroline=False)
    return fig.update_xaxes(zeroline=False)
