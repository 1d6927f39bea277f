"""What changed over training: lines over the steps on a logarithmic axis, the untrained model at its left end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from jambascope.studies.figures.theme import GUIDE, frame
from jambascope.studies.figures.zoo import BAND, GRID, Point, looks


def courses(
    title: str,
    subtitle: str,
    panels: Sequence[tuple[str, Sequence[Point]]],
    unit: str,
    unit_range: bool = False,
    guides: Mapping[str, float] = {},
) -> go.Figure:
    """A panel beside the other, a line with its interval for each model.

    Args:
        panels: names and points, of which ``x`` is the training step; 0 stands left of the first step.
        unit: of all y axes.
        unit_range: whether y runs from 0 to 1 in all panels, which then share it.
        guides: name of a panel -> a level drawn across it, such as chance.
    """
    models = list(dict.fromkeys(p.model for _, points in panels for p in points))
    steps = sorted({p.x for _, points in panels for p in points})
    least = min(step for step in steps if step > 0)
    gap = 0.02 if unit_range else 0.09
    fig = make_subplots(
        1, len(panels), subplot_titles=[name for name, _ in panels], shared_yaxes=unit_range, horizontal_spacing=gap
    )
    for column, (name, points) in enumerate(panels, 1):
        for model, (color, dash) in looks(models).items():
            own = sorted((p for p in points if p.model == model), key=lambda p: p.x)
            for trace in _traces(own, model, color, dash, least / 2, column == 1):
                fig.add_trace(trace, 1, column)
        if name in guides:
            fig.add_hline(guides[name], line={"color": GUIDE, "width": 1, "dash": "dot"}, row=1, col=column)
    ticks = log_ticks(least, steps[-1])
    texts = [f"{tick:g}" for tick in ticks]
    if steps[0] == 0:
        ticks, texts = [least / 2, *ticks], ["0", *texts]
    ends = [math.log10(least / 2 if steps[0] == 0 else least) - 0.06, math.log10(steps[-1]) + 0.06]
    axis = {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": texts, "range": ends, "tickangle": 0}
    fig.update_xaxes(axis | {"title": {"text": "training step", "standoff": 6}, "showgrid": False, "zeroline": False})
    fig.update_yaxes(gridcolor=GRID, zeroline=False, **({"range": [-0.03, 1.03]} if unit_range else {}))
    fig.update_yaxes(title=unit, row=1, col=1)
    frame(fig, title, subtitle, height=400)
    below = {"orientation": "h", "yanchor": "bottom", "y": 0, "yref": "container", "xanchor": "left", "x": 0}
    return fig.update_layout(legend=below, margin={"t": 105, "b": 105})


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between two positive ones, the more the closer they lie: at most ``most``."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**e for e in exponents for s in steps if low * 0.999 <= s * 10.0**e <= high * 1.001]
        if len(ticks) <= most:
            return ticks
    return ticks[:: -(-len(ticks) // most)]


def _traces(points: Sequence[Point], model: str, color: str, dash: str, zero: float, named: bool) -> list[go.Scatter]:
    if not points:
        return []
    bounded = [p for p in points if math.isfinite(p.low) and math.isfinite(p.high)]
    at = [p.x or zero for p in bounded]
    same = {"legendgroup": model, "name": model}
    return [
        go.Scatter(
            x=[*at, *at[::-1]], y=[*(p.high for p in bounded), *(p.low for p in bounded[::-1])], fill="toself",
            fillcolor=f"rgba{(*hex_to_rgb(color), BAND)}", mode="none", hoverinfo="skip", showlegend=False, **same,
        ),
        go.Scatter(
            x=[p.x or zero for p in points], y=[p.mean for p in points], mode="lines+markers", showlegend=named,
            line={"color": color, "dash": dash, "width": 2}, marker={"size": 5},
            customdata=[(p.x, p.low, p.high) for p in points],
            hovertemplate=f"{model}, step %{{customdata[0]:g}}: %{{y:.3f}} "
            "[%{customdata[1]:.3f}, %{customdata[2]:.3f}]<extra></extra>", **same,
        ),
    ]  # fmt: skip
