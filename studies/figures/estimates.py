"""Numbers with their intervals beside what chance or a control gives: dots with whiskers over grey bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go
import torch
from jaxtyping import Float

from jambascope.hooks.intervals import bootstrap_interval
from jambascope.studies.figures.theme import FIRST, GUIDE, SECOND, frame

GRID = "rgba(128,128,128,0.25)"
CHANCE = "rgba(128,128,128,0.45)"
COLORS = (FIRST, SECOND, "#009E73", "#CC79A7", "#D55E00", GUIDE)
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
WIDTH = 0.7
"""Of a place, in which the series stand side by side."""


class Estimate(NamedTuple):
    """A number with its interval, without bounds (or NaN) where there is none."""

    place: str
    series: str
    value: float
    low: float = math.nan
    high: float = math.nan
    chance: tuple[float, float] | None = None
    """What chance gives: the ends of its range, the same twice for a single level."""

    @classmethod
    def of(cls, place: str, series: str, samples: Float[torch.Tensor, " n"]) -> Estimate:
        """The mean of samples with its bootstrap interval."""
        low, high = bootstrap_interval(samples)
        return cls(place, series, float(samples.mean()), float(low), float(high))

    def __str__(self) -> str:
        """As in ``+0.50 [+0.40, +0.70]``."""
        return f"{self.value:+z.2f} [{self.low:+z.2f}, {self.high:+z.2f}]"


def estimates(
    title: str, subtitle: str, points: Sequence[Estimate], place_title: str, unit: str, log: bool = False
) -> go.Figure:
    """A place on the axis for each ``place``, in which the series stand beside each other in their colours.

    Args:
        log: a logarithmic scale; values must be positive.
    """
    places = list(dict.fromkeys(p.place for p in points))
    series = list(dict.fromkeys(p.series for p in points))
    step = WIDTH / len(series)
    fig = go.Figure()
    for i, name in enumerate(series):
        own = [p for p in points if p.series == name]
        x = [places.index(p.place) + (i - (len(series) - 1) / 2) * step for p in own]
        fig.add_trace(_chance(own, x, 0.42 * step, i == 0))
        fig.add_trace(_dots(own, x, name, COLORS[i % len(COLORS)], SYMBOLS[i % len(SYMBOLS)]))
    frame(fig, title, subtitle, height=400, showlegend=len(series) > 1 or any(p.chance for p in points))
    fig.update_layout(legend={"y": 0, "yref": "container", "yanchor": "bottom", "x": 0, "xanchor": "left"})
    fig.update_layout(margin_b=105)
    ticks = {"tickmode": "array", "tickvals": list(range(len(places))), "ticktext": places}
    fig.update_xaxes(ticks | {"range": [-0.5, len(places) - 0.5], "showgrid": False, "zeroline": False})
    fig.update_xaxes(title={"text": place_title, "standoff": 8})
    fig.update_yaxes(title=unit, gridcolor=GRID, zerolinecolor=GUIDE, rangemode="tozero")
    return fig.update_yaxes(type="log", dtick=1) if log else fig


def _chance(points: Sequence[Estimate], x: Sequence[float], half: float, named: bool) -> go.Scatter:
    """A thick bar from end to end of each range, or a short line across where it is a single level."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for at, point in zip(x, points, strict=True):
        if point.chance is not None:
            low, high = point.chance
            xs += [at - half, at + half, at + half, at - half, at - half, None]
            ys += [low, low, high, high, low, None]
    return go.Scatter(
        x=xs, y=ys, mode="lines", fill="toself", fillcolor=CHANCE, line={"color": GUIDE, "width": 2}, name="chance",
        legendgroup="chance", showlegend=named and bool(xs), hoverinfo="skip",
    )  # fmt: skip


def _dots(points: Sequence[Estimate], x: Sequence[float], name: str, color: str, symbol: str) -> go.Scatter:
    known = [math.isfinite(p.low) and math.isfinite(p.high) for p in points]
    up = [p.high - p.value if k else 0 for p, k in zip(points, known, strict=True)]
    down = [p.value - p.low if k else 0 for p, k in zip(points, known, strict=True)]
    texts = [
        f"{p.place}, {name}: {p.value:.4g}" + (f" [{p.low:.4g}, {p.high:.4g}]" if k else "")
        for p, k in zip(points, known, strict=True)
    ]
    return go.Scatter(
        x=x, y=[p.value for p in points], mode="markers", name=name, text=texts, hovertemplate="%{text}<extra></extra>",
        marker={"color": color, "size": 9, "symbol": symbol}, cliponaxis=False,
        error_y={"type": "data", "symmetric": False, "array": up, "arrayminus": down, "color": color, "width": 4},
    )  # fmt: skip
