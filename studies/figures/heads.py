"""Scores of attention heads as maps, and what taking heads away does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from jambascope.studies.figures.theme import (
    AMOUNT,
    FIRST,
    GUIDE,
    SECOND,
    SELECTED,
    SIGNED,
    click_targets,
    color_bar,
    frame,
    integer_axis,
)

GRID = "rgba(128,128,128,0.25)"
COLORS = {"found": SECOND, "random": FIRST}


def score_map(
    title: str,
    subtitle: str,
    layers: Sequence[int],
    scores: Float[np.ndarray, "layers heads"],
    hover: Sequence[Sequence[str]],
    marked: Sequence[tuple[int, int]] = (),
    unit: str = "score",
    limit: float = 1.0,
    signed: bool = False,
    clickable: bool = False,
) -> go.Figure:
    """A number for every head: layers up, heads across.

    Args:
        layers: of the rows.
        hover: text of every cell, as ``scores``.
        marked: (layer, head) that get a frame.
        limit: where the colour scale ends.
        signed: it begins at ``-limit``, and zero is in its middle.
        clickable: a click on a cell selects a point whose ``customdata`` is ``[layer, head]``.
    """
    low, colors = (-limit, SIGNED) if signed else (0, AMOUNT)
    fig = go.Figure(
        go.Heatmap(
            z=scores, zmin=low, zmax=limit, colorscale=colors, customdata=hover, xgap=1, ygap=1,
            hovertemplate="%{customdata}<extra></extra>", colorbar=color_bar(unit),
        )
    )  # fmt: skip
    for trace in _numbers(scores, limit, signed) if scores.shape[1] <= 16 else ():
        fig.add_trace(trace)
    if clickable:
        fig.data[0].update(hoverinfo="skip", hovertemplate=None)
        fig.add_trace(_targets(layers, hover))
    for layer, head in marked:
        x, y = head, list(layers).index(layer)
        box = {"x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5}
        fig.add_shape(type="rect", line={"color": SELECTED, "width": 3}, **box)
    frame(fig, title, subtitle, height=160 + max(80, 34 * len(layers)))
    fig.update_xaxes(integer_axis(range(scores.shape[1]), "head (index)"))
    fig.update_yaxes(integer_axis(list(layers), "layer (index)"))
    return fig


def _targets(layers: Sequence[int], hover: Sequence[Sequence[str]]) -> go.Scatter:
    cells = [(row, head) for row in range(len(layers)) for head in range(len(hover[row]))]
    custom, texts = [[layers[row], head] for row, head in cells], [hover[row][head] for row, head in cells]
    return click_targets([head for _, head in cells], [row for row, _ in cells], custom, texts, size=30)


def _numbers(scores: Float[np.ndarray, "layers heads"], limit: float, signed: bool) -> list[go.Scatter]:
    """The scores as text: dark on light cells and light on dark ones, whatever the page."""
    traces = []
    light = np.abs(scores) < 0.6 * limit if signed else scores > 0.55 * limit
    for color, where in (("#1c2733", light), ("#ffffff", ~light & np.isfinite(scores))):
        layers, heads = where.nonzero()
        texts = [f"{score:.2f}" for score in scores[where]]
        look = dict(mode="text", textfont={"color": color}, hoverinfo="skip", showlegend=False)
        traces.append(go.Scatter(x=heads, y=layers, text=texts, **look))
    return traces


class Effect(NamedTuple):
    """What taking ``count`` heads away changes, with its interval."""

    model: str
    heads: str
    """``found`` or ``random``."""
    count: int
    mean: float
    low: float
    high: float
    sets: tuple[float, ...] = ()
    """The change by each random set."""


def effects(title: str, points: Sequence[Effect], unit: str) -> go.Figure:
    """A panel for each model: found heads beside random ones, for every number of heads taken away; open circles
    are single random sets."""
    models = list(dict.fromkeys(p.model for p in points))
    fig = make_subplots(1, len(models), subplot_titles=models, shared_yaxes=True, horizontal_spacing=0.04)
    for column, model in enumerate(models, 1):
        counts = sorted({p.count for p in points if p.model == model})
        for side, (heads, color) in enumerate(COLORS.items()):
            own = [p for p in points if p.model == model and p.heads == heads]
            for trace in _traces(own, counts, 0.3 * side - 0.15, heads, color, column == 1):
                fig.add_trace(trace, 1, column)
        ticks = {"tickmode": "array", "tickvals": list(range(len(counts))), "ticktext": [str(k) for k in counts]}
        fig.update_xaxes(ticks | {"range": [-0.6, len(counts) - 0.4]}, row=1, col=column)
    fig.update_xaxes(title={"text": "heads taken away", "standoff": 6}, showgrid=False, zeroline=False)
    fig.update_yaxes(gridcolor=GRID, zerolinecolor=GUIDE, rangemode="tozero")
    fig.update_yaxes(title=unit, row=1, col=1)
    frame(fig, title, "means and 95 % intervals; open circles: single random sets", height=380)
    below = {"orientation": "h", "yanchor": "bottom", "y": 0, "yref": "container", "xanchor": "left", "x": 0}
    return fig.update_layout(legend=below, margin={"t": 100, "b": 100})


def _traces(
    points: Sequence[Effect], counts: Sequence[int], aside: float, heads: str, color: str, named: bool
) -> list[go.Scatter]:
    """Single sets, and means with whiskers."""
    known = [math.isfinite(p.low) and math.isfinite(p.high) for p in points]
    up = [p.high - p.mean if k else 0 for p, k in zip(points, known, strict=True)]
    down = [p.mean - p.low if k else 0 for p, k in zip(points, known, strict=True)]
    return [
        go.Scatter(
            x=[counts.index(p.count) + aside + 0.08 for p in points for _ in p.sets],
            y=[v for p in points for v in p.sets],
            mode="markers", marker={"color": color, "size": 6, "symbol": "circle-open"}, opacity=0.9,
            showlegend=False, hovertemplate="one random set: %{y:.3f}<extra></extra>", name=f"{heads}, single sets",
        ),
        go.Scatter(
            x=[counts.index(p.count) + aside for p in points], y=[p.mean for p in points], mode="markers", name=heads,
            showlegend=named, marker={"color": color, "size": 10},
            error_y={"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": color, "width": 5},
            customdata=[(p.low, p.high) for p in points],
            hovertemplate=f"{heads}: %{{y:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]<extra></extra>",
        ),
    ]  # fmt: skip
